"""MONAI's FlexibleUNet as a backbone: the 2D network of Semantic Genesis, a U-Net with a ResNet-18 encoder."""

from monai.networks.nets import FLEXUNET_BACKBONE, FlexibleUNet
from torch import Tensor

from .backbone import Backbone


class FlexibleUNetBackbone(Backbone):
    """A `monai.networks.nets.FlexibleUNet` with a ResNet encoder, default decoder, and no weights of other origin."""

    network: FlexibleUNet

    def __init__(self, network: FlexibleUNet) -> None:
        encoder = network.encoder
        super().__init__(
            network,
            encoder,
            network.segmentation_head,
            spatial_dims=network.spatial_dims,
            in_channels=next(encoder.parameters()).shape[1],
            out_channels=network.segmentation_head[0].out_channels,
            feature_channels=FLEXUNET_BACKBONE.register_dict[network.backbone]["feature_channel"],
            stride=32,
            blocks=[encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4, *network.decoder.blocks],
        )

    def decode(self, features: list[Tensor]) -> Tensor:
        return self.network.segmentation_head(self.network.decoder(features, self.network.skip_connect))

    def describe(self) -> dict:
        kwargs = {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "backbone": self.network.backbone,
            "pretrained": False,
            "spatial_dims": self.spatial_dims,
        }
        return {"class": "monai.networks.nets.FlexibleUNet", "kwargs": kwargs}
