"""The flows: the pipeline as Prefect sees it, derived from dvc.yaml."""
