"""The flows: Prefect's view of the pipeline, derived from dvc.yaml."""
