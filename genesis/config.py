"""Typed configs: one YAML file per method and dimension, validated; `load_config(name, overrides)`."""

import difflib
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from .errors import UserError

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]

EXPECTED = {  # by pydantic's name of the error that a value of another kind is
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    "tuple_type": "a list, for instance [32,32,32]",
}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(_Section):
    """What a patch is. Discovery and training must agree on this section, but for `resident`."""

    patch_size: tuple[PositiveInt, ...]  # voxels per side, 3 numbers (x, y, z) or 2 (x, y)
    spacing_mm: Literal["median", "native"] | tuple[PositiveFloat, ...]  # voxel size of a patch
    window_hu: tuple[float, float]  # CT only: mapped to [0, 1]; MR and X-ray use the foreground's p0.5 and p99.5
    resident: Literal["auto"] | Share = "auto"  # of the training device's memory, for volumes to stay in; 0: streamed

    @field_validator("resident", mode="wrap")
    @classmethod
    def _share_of_memory(cls, value: object, accepted: ValidatorFunctionWrapHandler) -> object:
        with suppress(ValidationError):
            if not isinstance(value, bool):  # a number to pydantic
                return accepted(value)
        raise ValueError("must be auto, or a share of the device's memory from 0 (off) to 1")


class AutoencoderConfig(_Section):
    steps: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    shape: tuple[PositiveInt, ...]  # voxels to which a whole volume (2D: slice) is resized
    channels: tuple[PositiveInt, ...] = Field(min_length=1)  # of each stride-2 stage; the last is the latent's length


class DiscoveryConfig(_Section):
    autoencoder: AutoencoderConfig
    classes: PositiveInt  # C anchors, hence pseudo-labels
    neighbours: PositiveInt  # K patients per reference, itself included
    validation_neighbours: PositiveInt  # nearest held-out patients per reference
    references: Literal["one", "per_class"]
    anchor_space: Literal["voxel", "body", "matched"]
    min_score: Share  # a match with a lower normalised cross-correlation is dropped
    min_tissue: Share  # share of a patch that must lie in the foreground
    multi_resolution: bool  # train also on crops whose in-plane side is scaled by 50/64..79/64, shifted, resized


class NetworkConfig(_Section):
    name: Literal["unet", "published_unet", "flexible_unet"]
    channels: tuple[PositiveInt, ...] | None = None  # unet only
    strides: tuple[PositiveInt, ...] | None = None
    num_res_units: int | None = Field(default=None, ge=0)
    norm: Literal["instance", "batch"] | None = None  # unet only; null: instance, which small batches do not mislead
    backbone: str | None = None  # flexible_unet only, for instance resnet18


class CorruptionConfig(_Section):
    """The rates of METHODS: Models Genesis, table of transforms."""

    flip: Share
    shuffle: Share
    nonlinear: Share
    paint: Share
    outpaint: Share  # of those painted; the rest is in-painted
    paint_fill: Literal["voxel", "constant"]


Needs = Literal["patches", "pseudo_labels", "views", "reports"]  # which sampler feeds a method


class RestorationConfig(_Section):
    """Semantic Genesis, and what it is made of: one method with switches."""

    name: Literal[
        "semantic_genesis", "models_genesis", "inpainting", "patch_shuffling", "autoencoder", "classification_only"
    ]
    semantics: bool = True  # also classify pseudo-labels, which discover finds
    lambda_rec: float = Field(ge=0)
    lambda_cls: float = Field(ge=0)  # without semantics it has no effect
    classify: Literal["corrupted", "clean"]
    corruption: CorruptionConfig

    @property
    def needs(self) -> Needs:
        return "pseudo_labels" if self.semantics else "patches"

    @model_validator(mode="after")
    def _learns(self) -> "RestorationConfig":
        if not self.lambda_rec and not (self.semantics and self.lambda_cls):
            raise ValueError("lambda_rec is 0 and so is lambda_cls, or semantics is off: nothing would be learned")
        return self


class IntensityConfig(_Section):
    """How far a view's intensities may change; see `IntensityRange`."""

    gamma: NonNegative  # exponent from exp(-gamma) to exp(gamma)
    gain: NonNegative  # factor 1 ± gain
    offset: NonNegative  # ± of the range [0, 1]
    field: NonNegative  # smooth factor from exp(-field) to exp(field), as of an MR coil
    noise: NonNegative  # largest standard deviation
    blur: NonNegative  # largest standard deviation, voxels


class IntensitiesConfig(_Section):
    """By modality."""

    ct: IntensityConfig
    mr: IntensityConfig
    xray: IntensityConfig


class ViewsConfig(_Section):
    """What views of a patch a method compares; global ones have the size data.patch_size. See `MultiCrop`."""

    source: float = Field(ge=1)  # sides of the region that views are cut from, in sides of a patch
    global_views: int = Field(ge=2)
    local_views: int = Field(default=0, ge=0)
    local_size: tuple[PositiveInt, ...] | None = None  # voxels
    global_scale: tuple[Share, Share]  # of the region's volume (2D: area)
    local_scale: tuple[Share, Share] | None = None
    min_overlap: Share  # that a global view has in common with the first one
    aspect: float = Field(ge=1)  # largest ratio of a view's sides
    rotation_degrees: float = Field(ge=0, le=180)  # to either side, in the axial plane
    flip: tuple[Literal["x", "y", "z"], ...]  # axes along which half of the views are mirrored; x is left to right
    intensity: IntensitiesConfig

    def region(self, patch_size: Sequence[int]) -> tuple[int, ...]:
        """Voxels per side of the region that views are cut from, at a patch's voxel size."""
        return tuple(math.ceil(round(self.source * side, 6)) for side in patch_size)

    @model_validator(mode="after")
    def _views_are_complete(self) -> "ViewsConfig":
        if self.local_views and (self.local_size is None or self.local_scale is None):
            raise ValueError("local views need local_size and local_scale")
        for name, scale in (("global_scale", self.global_scale), ("local_scale", self.local_scale)):
            if scale and not 0 < scale[0] <= scale[1]:
                raise ValueError(f"{name} {list(scale)} must be [lower, upper], both above 0")
        return self


class ViewMethodConfig(_Section):
    """What methods that compare views of patches have in common."""

    views: ViewsConfig

    @property
    def needs(self) -> Needs:
        return "views"


class ContrastConfig(_Section):
    hidden: PositiveInt  # of the projection head
    dim: PositiveInt  # of embeddings
    temperature: PositiveFloat
    virtual_batch: PositiveInt | None = None  # samples in the loss of a step; train.batch_size are encoded at once


class ContrastiveConfig(ViewMethodConfig):
    """What SimCLR and MoCo v2 have in common."""

    contrast: ContrastConfig

    @model_validator(mode="after")
    def _compares_two_views(self) -> "ContrastiveConfig":
        if self.views.global_views != 2 or self.views.local_views:
            raise ValueError("two views are compared: views.global_views must be 2 and views.local_views 0")
        return self


class SimCLRConfig(ContrastiveConfig):
    name: Literal["simclr"]


class MoCoV2Config(ContrastiveConfig):
    name: Literal["moco_v2"]
    queue: PositiveInt  # older keys, the negatives
    momentum: float = Field(ge=0, lt=1)  # of the teacher


class PrototypesConfig(_Section):
    count: Annotated[int, Field(ge=2)]
    frozen_steps: int = Field(ge=0)  # the first, in which they stay as they are


class PrototypeBlocksConfig(PrototypesConfig):
    per: Literal["modality", "shared"]  # modality: each has `count` prototypes of its own


class _ClusteringConfig(ViewMethodConfig):
    """What SwAV and online clustering have in common."""

    hidden: PositiveInt  # of the projection head
    dim: PositiveInt  # of embeddings
    temperature: PositiveFloat  # of the prediction of codes
    epsilon: PositiveFloat  # of Sinkhorn-Knopp: the smaller, the sharper are codes
    iterations: PositiveInt
    queue: int = Field(ge=0)  # earlier samples that codes are computed over, beside the batch; 0: none
    queue_start: int = Field(ge=0)  # step


class SwavConfig(_ClusteringConfig):
    name: Literal["swav"]
    prototypes: PrototypesConfig


class EnergyConfig(_Section):
    """Energy-based intensity augmentation; see `EnergyBands`."""

    probability: Share  # of a view
    bands: PositiveInt
    spread: float = Field(ge=1)  # a target is 1 / spread to spread times the band's energy
    pull: Share  # 0: nothing changes; 1: local energies become the target


class OnlineClusteringConfig(_ClusteringConfig):
    name: Literal["online_clustering"]
    prototypes: PrototypeBlocksConfig
    energy: EnergyConfig
    alpha: PositiveFloat  # weight of the swapped prediction
    hybrid: bool  # also classify whole scans by their target, where they have one


class TextConfig(_Section):
    """The text encoder of image-text methods, and what of a report it is shown."""

    model: str | None  # a folder, or an id of the Hugging Face hub; null: a small one, for the words of these reports
    revision: str | None  # of a model of the hub: the commit
    shown: Literal["sentence", "section", "shuffled_sections", "full"]  # of a report, drawn anew for every sample
    length: Annotated[int, Field(ge=8)]  # tokens of a text; what is longer is cut
    frozen_layers: int | None = Field(ge=0)  # embeddings and the first so many layers stay as they are; null: none


class ConVIRTConfig(_Section):
    name: Literal["convirt"]
    temperature: PositiveFloat
    image_weight: Share  # λ, of the loss from image to text; 1 - λ of that from text to image
    projection: PositiveInt  # length of the embeddings
    text: TextConfig

    @property
    def needs(self) -> Needs:
        return "reports"


class GLoRIAConfig(_Section):
    name: Literal["gloria"]
    attention: Literal["exact", "scaled"]  # of words to regions: exact is published, and saturates for long vectors
    regions: PositiveInt  # most places of the feature map in which words look
    text: TextConfig

    @property
    def needs(self) -> Needs:
        return "reports"


ImageTextConfig = ConVIRTConfig | GLoRIAConfig
MethodConfig = Annotated[
    RestorationConfig
    | SimCLRConfig
    | MoCoV2Config
    | SwavConfig
    | OnlineClusteringConfig
    | ConVIRTConfig
    | GLoRIAConfig,
    Field(discriminator="name"),
]


class OptimizerConfig(_Section):
    name: Literal["adam", "adamw", "sgd"]
    learning_rate: PositiveFloat
    weight_decay: float = Field(ge=0)
    schedule: Literal["constant", "step", "cosine"]
    warmup_steps: int = Field(ge=0)
    step_size: PositiveInt | None = None  # schedule step: halve (gamma) every so many steps
    gamma: PositiveFloat | None = None
    clip_norm: PositiveFloat | None = None

    @model_validator(mode="after")
    def _schedule_is_complete(self) -> "OptimizerConfig":
        if self.schedule == "step" and (self.step_size is None or self.gamma is None):
            raise ValueError("schedule step needs step_size and gamma")
        return self


class TrainConfig(_Section):
    steps: PositiveInt
    batch_size: PositiveInt  # over all ranks
    optimizer: OptimizerConfig
    precision: Literal["auto", "fp32", "bf16"]  # auto: bf16 autocast on CUDA, fp32 elsewhere
    compile: Literal["auto"] | bool = "auto"  # torch.compile; auto: on CUDA; off, with a line, where it fails
    accumulate: PositiveInt = 1  # parts in which a rank computes its share of a batch, to save memory
    recompute_activations: bool = False  # in the backward pass, instead of keeping them: saves memory, costs time
    shard: bool = False  # weights, gradient, optimizer state divided among ranks (FSDP): networks too big for one card
    validate_every: PositiveInt  # steps
    validation_samples: PositiveInt
    patience: PositiveInt  # validations without improvement before stopping early
    workers: Literal["auto"] | Annotated[int, Field(ge=0)]  # data loading processes


class FinetuneConfig(_Section):
    steps: PositiveInt
    batch_size: PositiveInt
    patch_size: tuple[PositiveInt, ...] | None  # null: the package's
    spacing_mm: tuple[PositiveFloat, ...] | None  # null: the package's
    window_hu: tuple[float, float] | None  # null: the package's
    learning_rates: tuple[PositiveFloat, ...] = Field(min_length=1)  # each arm takes the best on the validation split
    weight_decay: float = Field(ge=0)
    warmup_steps: int = Field(ge=0)
    background_weight: PositiveFloat  # of the background in the cross-entropy
    foreground_share: Share  # of patches centred on a labelled voxel
    validate_every: PositiveInt
    workers: Literal["auto"] | Annotated[int, Field(ge=0)]


class Config(_Section):
    spatial_dims: Literal[2, 3]
    data: DataConfig
    discovery: DiscoveryConfig | None = None  # of methods that take no pseudo-labels; then discover fills it in
    network: NetworkConfig
    method: MethodConfig
    train: TrainConfig
    finetune: FinetuneConfig

    @property
    def samples_per_step(self) -> int:
        """Over all ranks."""
        contrast = self.method.contrast if isinstance(self.method, ContrastiveConfig) else None
        return (contrast and contrast.virtual_batch) or self.train.batch_size

    @model_validator(mode="after")
    def _samples_are_compared(self) -> "Config":
        if not isinstance(self.method, ContrastiveConfig):
            return self
        parts, batch, samples = self.train.accumulate, self.train.batch_size, self.samples_per_step
        if parts > 1:
            raise ValueError(
                f"train.accumulate is {parts}, but {self.method.name} compares the samples of a step: set it to 1, "
                f"train.batch_size to what fits and method.contrast.virtual_batch to the samples of a step, now {batch}"
            )
        if samples % batch:
            raise ValueError(
                f"method.contrast.virtual_batch is {samples}: it must be a multiple of train.batch_size, {batch}"
            )
        if self.method.name == "simclr" and samples < 2:
            raise ValueError("simclr compares the samples of a step: train.batch_size must be at least 2")
        return self

    @model_validator(mode="after")
    def _batch_is_whole(self) -> "Config":
        if self.train.accumulate > 1 and isinstance(self.method, _ClusteringConfig):
            raise ValueError(
                f"train.accumulate is {self.train.accumulate}, but {self.method.name} clusters whole batches: "
                "set it to 1, with a smaller train.batch_size and a longer method.queue where memory is short"
            )
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> "Config":
        views = self.method.views if isinstance(self.method, ViewMethodConfig) else None
        if views and self.spatial_dims == 2 and "z" in views.flip:
            raise ValueError("method.views.flip has z; a 2D config has x and y")
        for name, size in (("data.patch_size", self.data.patch_size), ("data.spacing_mm", self.data.spacing_mm),
                           ("discovery.autoencoder.shape", self.discovery and self.discovery.autoencoder.shape),
                           ("method.views.local_size", views and views.local_size),
                           ("finetune.patch_size", self.finetune.patch_size)):  # fmt: skip
            if isinstance(size, tuple) and len(size) != self.spatial_dims:
                raise ValueError(
                    f"{name} has {len(size)} numbers; a {self.spatial_dims}D config needs {self.spatial_dims}"
                )
        for name, window in (("data", self.data.window_hu), ("finetune", self.finetune.window_hu)):
            if window and window[0] >= window[1]:
                raise ValueError(f"{name}.window_hu {list(window)} must be [lower, upper]")
        if min(self.data.patch_size) < 8:
            raise ValueError(f"data.patch_size {list(self.data.patch_size)} has a side below 8 voxels")
        if self.method.needs == "reports" and self.train.accumulate > 1:
            raise ValueError(
                "train.accumulate cannot divide a batch whose samples are each other's negatives; set it to 1 and use "
                "train.recompute_activations, a smaller train.batch_size, or more devices"
            )
        return self

    def dump(self) -> str:
        """As YAML that `load_config` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, default_flow_style=None)


def load_config(
    name: str, overrides: Sequence[str] = (), *, sample: bool = False, values: Mapping[str, Any] | None = None
) -> Config:
    """A validated config.

    `name` is a shipped recipe or a YAML file; `sample` overlays the sizes for the embedded sample cohort; `values` are
    whole sections or dotted keys that a verb sets from its flags; `overrides` are `section.key=value` strings.
    Precedence: file < overlay < values < overrides. Raises `UserError` for anything unknown or out of range.
    """
    tree = _read(name)
    if sample:
        overlay = yaml.safe_load(_shipped("sample"))
        dims, method = tree.get("spatial_dims"), tree.get("method")
        _merge(tree, overlay.get(f"{dims}d", {}))
        _merge(tree, overlay.get(f"{method.get('name')}_{dims}d", {}) if isinstance(method, dict) else {})
    for dotted, value in (values or {}).items():
        _assign(tree, dotted, value)
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted.strip():
            raise UserError(f"--set {override}: expected section.key=value, for instance --set train.steps=2000.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--set {override}: {text!r} is not a YAML value.") from None
        _assign(tree, dotted.strip(), value)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"config {name}: {_explain(error)}") from None


def image_text_settings(tree: Any) -> ImageTextConfig:
    """The section `method` of image-text methods alone, as a dumped config has it. Raises `UserError`."""
    adapter: TypeAdapter[ImageTextConfig] = TypeAdapter(ImageTextConfig)
    try:
        return adapter.validate_python(tree)
    except ValidationError as error:
        raise UserError(f"These are no settings of a method: {' '.join(str(error).split())[:200]}") from None


def recipes() -> list[str]:
    """Names of the shipped configs."""
    files = (item.name for item in resources.files("genesis.configs").iterdir())
    return sorted(file.removesuffix(".yaml") for file in files if file.endswith(".yaml") and file != "sample.yaml")


def _read(name: str) -> dict[str, Any]:
    if name in recipes():
        text = _shipped(name)
    elif name.endswith((".yaml", ".yml")):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"The config file {name} cannot be read: {error}.") from None
    else:
        raise UserError(
            f"There is no config named {name!r}; shipped are {', '.join(recipes())}; a file must end in .yaml."
        )
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"The config {name} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(tree, dict):
        raise UserError(f"The config {name} must be a mapping of sections; start from a copy of semantic_genesis_3d.")
    return tree


def _shipped(name: str) -> str:
    return resources.files("genesis.configs").joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def _merge(tree: dict[str, Any], overlay: dict[str, Any]) -> None:
    """Replace values that are there; a size that a recipe does not have (another network's channels) is not added."""
    for key, value in overlay.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        elif key in tree:
            tree[key] = value


def _assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"{dotted}: {parent} is a single value, not a section.")
    tree[last] = value


def _explain(error: ValidationError) -> str:
    errors = error.errors()
    first = errors[0]
    section, place = _place(first["loc"])
    if first["type"] == "extra_forbidden":
        unknown, known = str(first["loc"][-1]), list(section.model_fields)
        close = difflib.get_close_matches(unknown, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}."
        return f"unknown key {'.'.join([*place, unknown])}; {hint}"
    if first["type"] == "missing":
        return f"{'.'.join(place)} is missing."
    if first["type"] == "union_tag_not_found":
        return f"{'.'.join(place)}.name is missing."
    if first["type"] == "union_tag_invalid":
        return f"{'.'.join(place)}.name: expected {first['ctx']['expected_tags']} (got {first['ctx']['tag']!r})."
    for each in errors:  # where a word or a number may stand: of what is a number, say what is wrong with it
        inside = _place(each["loc"])[1]
        if inside[: len(place)] == place and (inside != place or not _expected(each)):
            first, place = each, inside
            break
    plain = {"model_type": "is a section, not a value", "model_attributes_type": "is a section, not a value"}
    message = plain.get(first["type"], first["msg"].removeprefix("Value error, "))
    if _expected(first):
        kinds = [_expected(each) for each in errors if _place(each["loc"])[1] == place]
        message = f"expected {' or '.join(kinds)}"
    got = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
    return f"{'.'.join(place)}: {message}{got}." if place else f"{message}."


def _expected(error: ErrorDetails) -> str:
    """What may stand there, in words, where a value is of another kind; else ""."""
    return error["ctx"]["expected"] if error["type"] == "literal_error" else EXPECTED.get(error["type"], "")


def _place(location: Sequence[int | str]) -> tuple[type[BaseModel], list[str]]:
    """The innermost section, and the keys on the way, without pydantic's names for the kinds a value may have."""
    section: type[BaseModel] = Config
    kinds: dict[str, type[BaseModel]] = {}  # of a section that there are, by their names
    place = []
    for part in location:
        if isinstance(part, int):
            place.append(str(part))
        elif part in kinds:
            section, kinds = kinds[part], {}
        elif part in section.model_fields:
            place.append(part)
            inner = section.model_fields[part].annotation
            sections = [
                one for one in (inner, *get_args(inner)) if isinstance(one, type) and issubclass(one, BaseModel)
            ]
            if len(sections) == 1:
                section = sections[0]
            elif sections:
                kinds = {name: one for one in sections for name in get_args(one.model_fields["name"].annotation)}
    return section, place
