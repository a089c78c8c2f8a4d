"""What a run will take, told before anything is spent: the steps of its stages, and the memory that they cannot do
without. How long it takes is known from earlier runs (`steersman.local.pace`)."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from steersman.config.kinds.registry import StageOptions
from steersman.config.manifest import AlignmentRun, IlqlStage
from steersman.config.stages import data_files
from steersman.data.records import read_lines

ADAM = 16
"""Bytes of a weight that is trained: itself, its gradient and two moments, in fp32."""
ADAPTER_SHARE = 0.005 / 16
"""Weights of an adapter, for each rank, as a share of the model's."""


@dataclass(frozen=True)
class StageNeeds:
    steps: int | None
    """Optimizer steps, or rounds; None: it makes none, or how many is known only later."""
    memory_gib: float | None
    """Weights and optimizer states of all its processes on this machine, without activations, caches and libraries;
    None: the model is not here as safetensors."""


def expected_of(run: AlignmentRun, run_dir: Path) -> dict[str, StageNeeds]:
    """Of every stage, by name, after `prepare` has brought model and data into the run's folder."""
    try:
        prepared = json.loads((run_dir / "prepared.json").read_bytes())
        parameters = count_parameters(Path(prepared["base"]))
        width = 2 if prepared["precision"] == "bf16" else 4
    except FileNotFoundError:
        parameters, width = None, 4
    found = {}
    for name, stage in run.stages():
        rows = _rows(run, run_dir, stage)
        memory = None if parameters is None else parameters * _bytes_of_weights(run, stage, width) / 2**30
        found[name] = StageNeeds(None if rows is None else stage.steps_on(rows), memory)
    return found


def count_parameters(folder: Path) -> int | None:
    """Numbers in a model folder's safetensors, by their headers; None where it has none."""
    files = sorted(folder.glob("*.safetensors"))
    total = 0
    for path in files:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total if files else None


def _rows(run: AlignmentRun, run_dir: Path, stage: StageOptions) -> int | None:
    """Training rows that it reads; 0 for a kind that reads none; None where they are not counted by lines."""
    kinds = stage.learn_from if isinstance(stage, IlqlStage) else [stage.needed_data] if stage.needed_data else []
    if isinstance(stage, IlqlStage) and kinds != ["returns"]:
        return None  # a comparison is two conversations, a tie none
    paths = [data_files(run, run_dir).get(kind, {}).get("train") for kind in kinds]
    if any(path is None or not path.is_file() for path in paths):
        return None
    return sum(sum(1 for _ in read_lines(path)) for path in paths if path is not None)


def _bytes_of_weights(run: AlignmentRun, stage: StageOptions, width: int) -> float:
    """Bytes for each parameter of the base model: the trainer's, and those of the services that the run starts.

    The formulas are those of docs/deployment.md, 'Sizing'.
    """
    total = 0.0
    if hasattr(stage, "lora"):
        if stage.lora is None:
            total += ADAM
        else:
            total += (0.6 if stage.lora.quantize else 4) + ADAM * ADAPTER_SHARE * stage.lora.rank
    if stage.uses_services:
        services = run.spec.services
        for service in (services.policy, services.reward, services.reference):
            total += 0 if service.endpoints else width * service.replicas
    return total
