"""YAML recipes, one per method and dimension; `sample.yaml` overlays the sizes for the embedded sample cohort."""
