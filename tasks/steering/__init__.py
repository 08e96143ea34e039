"""Control of stages from outside: Prefect's task, the check of parameters, the sender of records to MLflow."""
