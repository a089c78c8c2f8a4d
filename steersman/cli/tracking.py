"""`steersman track`: sends a run to its trackers that was made without them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def track(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    mlflow: Annotated[str | None, typer.Option(help="URL of an MLflow server, in place of the manifest's.")] = None,
    tensorboard: Annotated[bool, typer.Option(help="Also write event files for TensorBoard.")] = False,
    wandb: Annotated[str | None, typer.Option(help="Project at Weights & Biases.")] = None,
) -> None:
    """Sends parameters, metrics and artifacts of a run to MLflow, TensorBoard, Weights & Biases."""
    from steersman.config.manifest import load_manifest
    from steersman.errors import NotFoundError
    from steersman.tracking import Follower

    manifest = run / "manifest.yaml"
    if not manifest.is_file():
        raise NotFoundError(f"{manifest} does not exist; name the folder of a run")
    wanted = {"mlflow": mlflow, "wandb": wandb, "tensorboard": "true" if tensorboard else None}
    overrides = [f"spec.tracking.{name}={value}" for name, value in wanted.items() if value is not None]
    follower = Follower(load_manifest(manifest, overrides), run.absolute())
    follower.close()
    typer.echo(f"sent {run}")
