"""PEFT's add_weighted_adapter with and without our backend, our function on state dicts, and PEFT's conversion to LoRA.

    benchmarks/peers/peft_env.sh
    .venv-peft/bin/python -m benchmarks.peers.compare_peft [--shapes 1024x4096 4096x4096] [--rounds 5] [--json FILE]

Three rank-16 adapters of one linear layer are combined to rank 16 by every side in interleaved rounds: wall time of the
call, and peak memory beyond what was in use before it. Nearly all of the time of the defaults is PEFT's: some minutes.

A side is right if its result is as close to the uncut update, formed in float64, as PEFT's. Distances are relative to
the norm of the update. PEFT's own functions elect signs and prune elements of the uncut update.

`extract` is a layer changed by a LoHa adapter of rank 8: PEFT's `convert_to_lora` on the model in memory against
`rtsvm extract-lora`'s function on two files, with reading and writing.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoHaConfig, LoraConfig, convert_to_lora, get_peft_model, get_peft_model_state_dict
from peft.utils.merge_utils import task_arithmetic, ties
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.program import Program, Turns, finish, judged
from r_tsvm_kernels.bench import Results, Row, peak_of, row
from r_tsvm_kernels.integrations import peft as integration
from r_tsvm_kernels.lora import Adapter
from r_tsvm_kernels.lora_tools import extract_lora

PEFT, PATCHED, STATE_DICTS, EXTRACT = "PEFT", "PEFT on our kernels", "combine_adapters", "extract_lora"
RANK, DENSITY = 16, 0.3
NAMES, WEIGHTS = ["one", "two", "three"], [0.5, 0.8, -0.3]
KINDS = ("svd", "ties_svd")
SLACK = 1e-5  # of the distance to the uncut update: the rounding of float32
Shape = tuple[int, int]


class Layer(nn.Module):
    """A model of one linear layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.layer = nn.Linear(shape[1], shape[0], bias=False)


def measured(call: Callable[[], Any]) -> tuple[float, int, Any]:
    """Return seconds, peak bytes beyond what was in use, and the result."""

    def timed() -> tuple[float, Any]:
        start = time.perf_counter()
        result = call()
        return time.perf_counter() - start, result

    (seconds, result), peak = peak_of(timed)
    return seconds, peak, result


def lora_model(shape: Shape) -> Any:
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["layer"], init_lora_weights=False)
    model = get_peft_model(Layer(shape), config, NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    return model


def combination(model: Any, kind: str) -> dict[str, Callable[[], Any]]:
    """What each side calls; all but `STATE_DICTS` leave an adapter in the model."""
    options = {"combination_type": kind, "density": DENSITY if kind != "svd" else None}

    def in_model() -> None:
        model.add_weighted_adapter(NAMES, WEIGHTS, "new", svd_rank=RANK, **options)

    states = [get_peft_model_state_dict(model, adapter_name=name) for name in NAMES]
    configs = [model.peft_config[name].to_dict() for name in NAMES]
    return {
        PEFT: in_model,
        PATCHED: in_model,
        STATE_DICTS: lambda: integration.combine_adapters(states, configs, WEIGHTS, rank=RANK, **options)[0],
    }


def taken_out(model: Any, result: dict[str, Tensor] | None) -> Tensor:
    """The combined update in float64; an adapter that the call left in the model is removed."""
    if result is not None:
        A, B = (next(t for name, t in result.items() if f"lora_{factor}" in name) for factor in "AB")
        return B.double() @ A.double()
    layer = model.base_model.model.layer
    update = layer.lora_B["new"].weight.double() @ layer.lora_A["new"].weight.double()
    model.delete_adapter("new")
    return update.detach()


def uncut(model: Any, kind: str) -> Tensor:
    layer = model.base_model.model.layer
    updates = [layer.get_delta_weight(name).detach() for name in NAMES]
    if kind == "svd":
        return task_arithmetic([update.double() for update in updates], torch.tensor(WEIGHTS).double())
    return ties(updates, torch.tensor(WEIGHTS), DENSITY).double()


def compare(shape: Shape, kind: str, rounds: int) -> list[Row]:
    model = lora_model(shape)
    calls, target = combination(model, kind), uncut(model, kind)
    turns, updates = Turns(), {}
    for round_ in range(-1, rounds):  # in round -1 our side warms up
        for side, call in calls.items():
            if round_ == -1 and side == PEFT:
                continue
            if side == PATCHED:
                integration.install()
            elapsed, peak, result = measured(call)
            integration.uninstall()
            updates[side] = taken_out(model, result)
            if round_ >= 0:
                turns.add(side, elapsed, peak)
    return summary(turns, kind, shape, updates, target)


def compare_extraction(shape: Shape, rounds: int) -> list[Row]:
    model = get_peft_model(Layer(shape), LoHaConfig(r=8, target_modules=["layer"], init_weights=False))
    layer = model.base_model.model.layer
    base, delta = layer.get_base_layer().weight.detach(), layer.get_delta_weight("default").detach()
    turns, updates = Turns(), {}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("base.safetensors", "tuned.safetensors")]
        # The change itself is stored, so that both sides cut the same matrix.
        save_file({"layer.weight": torch.zeros_like(base)}, files[0])
        save_file({"layer.weight": delta.contiguous()}, files[1])
        for round_ in range(rounds):
            elapsed, peak, (_, state) = measured(lambda: convert_to_lora(model, RANK))
            turns.add(PEFT, elapsed, peak)
            A, B = (next(t for name, t in state.items() if f"lora_{factor}" in name) for factor in "AB")
            updates[PEFT] = B.double() @ A.double()
            out = Path(folder) / f"out{round_}"
            elapsed, peak, _ = measured(lambda out=out: extract_lora(str(files[0]), str(files[1]), out, rank=RANK))
            turns.add(EXTRACT, elapsed, peak)
            updates[EXTRACT] = Adapter(out).load("layer").dense().double()
    return summary(turns, "extract", shape, updates, delta.double())


def summary(turns: Turns, name: str, shape: Shape, updates: dict[str, Tensor], target: Tensor) -> list[Row]:
    case: dict[str, Any] = {"shape": shape, "dtype": "float32", "options": {"rank": RANK}}
    distances = {side: float((update - target).norm() / target.norm()) for side, update in updates.items()}
    rows = turns.rows(name, [PEFT], [side for side in updates if side != PEFT], **case)
    return rows + [
        judged(
            row(name, side, "distance to the uncut update", distance, unit="relative",
                role="peer" if side == PEFT else "ours", **case),
            distance <= distances[PEFT] + SLACK,
        )
        for side, distance in distances.items()
    ]  # fmt: skip


def main() -> int:
    program = Program(__doc__, "peft.json", rounds=5)
    parser = program.parser
    parser.add_argument("--shapes", nargs="+", default=["1024x4096", "4096x4096"], metavar="ROWSxCOLUMNS")
    parser.add_argument("--extract", default="1024x4096", metavar="ROWSxCOLUMNS", help="shape of the case `extract`")
    args = program.arguments()
    warnings.filterwarnings("ignore", message=".*(should not be contained in the prefix|quantization|already).*")
    torch.manual_seed(0)
    results = Results(args.json, ("peft", "safetensors"), replace=True)
    for text in args.shapes:
        for kind in KINDS:
            results.add(compare(parsed(text), kind, args.rounds))
    results.add(compare_extraction(parsed(args.extract), args.rounds))
    return finish(results)


def parsed(text: str) -> Shape:
    rows, columns = map(int, text.split("x"))
    return rows, columns


if __name__ == "__main__":
    sys.exit(main())
