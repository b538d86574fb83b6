"""Writers of rows for Weights & Biases and for MLflow."""

from collections.abc import Mapping
from typing import Any


def scalars(row: Mapping[str, Any], tasks: list[str]) -> dict[str, float]:
    """The numbers of a row, one for each task: ``train/losses/left``."""
    found = {}
    for name, value in row.items():
        if name in ("kind", "step") or value is None or isinstance(value, str | dict):
            continue
        if isinstance(value, list):
            names = tasks if len(tasks) == len(value) else map(str, range(len(value)))
            parts = zip(names, value, strict=True)
            found |= {f"{row['kind']}/{name}/{k}": v for k, v in parts if _number(v)}
        else:
            found[f"{row['kind']}/{name}"] = float(value)
    return found


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


class WandbWriter:
    """Logs to Weights & Biases. ``client`` is the module ``wandb``."""

    def __init__(self, client: Any, project: str, run_id: str):
        self.client, self.project, self.run_id = client, project, run_id

    def open(self, header: Mapping[str, Any], resume_step: int | None) -> None:
        """Starts or resumes the run with this identifier."""
        self.tasks = list(header.get("task_names") or [])
        self.after = -1 if resume_step is None else resume_step
        options = {"id": self.run_id, "resume": "allow", "config": header.get("config")}
        self.run = self.client.init(project=self.project, **options)

    def write(self, row: Mapping[str, Any]) -> None:
        """Logs one row."""
        if row["step"] > self.after:
            self.run.log(scalars(row, self.tasks), step=row["step"])

    def flush(self, *, durable: bool = False) -> None:
        """Does nothing: the client sends in the background."""

    def close(self) -> None:
        """Ends the run."""
        self.run.finish()


class MlflowWriter:
    """Logs to MLflow. ``client`` is an ``MlflowClient``, the run exists already."""

    def __init__(self, client: Any, run_id: str):
        self.client, self.run_id = client, run_id

    def open(self, header: Mapping[str, Any], resume_step: int | None) -> None:
        """Remembers the names of the tasks."""
        self.tasks = list(header.get("task_names") or [])
        self.after = -1 if resume_step is None else resume_step

    def write(self, row: Mapping[str, Any]) -> None:
        """Logs one row."""
        if row["step"] > self.after:
            for name, value in scalars(row, self.tasks).items():
                self.client.log_metric(self.run_id, name, value, step=row["step"])

    def flush(self, *, durable: bool = False) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Marks the run as finished."""
        self.client.set_terminated(self.run_id)
