"""What the engine logs: decisions at INFO, tensors at DEBUG. Handlers are the program's."""

import logging
from dataclasses import replace

import pytest
from checkpoints import family

from r_tsvm_kernels import MergeConfig, merge_checkpoints
from r_tsvm_kernels.engine import local, tiles


def messages(caplog, level):
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_a_merge_logs_its_decisions_and_its_tensors(tmp_path, caplog, monkeypatch):
    paths, base, _ = family(tmp_path / "in")
    base_model, *models = map(str, paths)
    config = MergeConfig("tsvm", base_model=base_model, models=models)
    left = iter(range(4))

    def merge_tile(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return tiles.merge_tile(*arguments)

    with caplog.at_level(logging.DEBUG, "r_tsvm_kernels"), monkeypatch.context() as patch:
        patch.setattr(local, "merge_tile", merge_tile)
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoints(config, tmp_path / "out", threads=1)
        info, debug = messages(caplog, logging.INFO), messages(caplog, logging.DEBUG)
        assert info[0].startswith(f"tsvm of 2 models into {tmp_path / 'out'}: {len(base)} tensors, ")
        assert info[1].startswith("1 of 1 threads, tiles of at most ") and len(info) == 2
        assert [f"{done} of {len(base)}" for done in range(1, 4)] == [
            m.split(":")[0] for m in debug if " of 10: " in m
        ][:3]
        patch.undo()
        caplog.clear()
        merge_checkpoints(config, tmp_path / "out", threads=1, resume=True)
    info = messages(caplog, logging.INFO)
    assert f"resumed: 4 of {len(base)} tensors are finished already" in info
    assert info[-1].startswith(f"merged {len(base) - 4} tensors into {tmp_path / 'out'} in ")
    assert logging.getLogger("r_tsvm_kernels").handlers == []


def test_escalations_are_logged(tmp_path, caplog, monkeypatch):
    paths, _, _ = family(tmp_path / "in")
    base_model, *models = map(str, paths)
    config = MergeConfig("tsvm", base_model=base_model, models=models)
    merge = tiles.merge_tensors

    def escalated(*arguments, **keywords):
        result = merge(*arguments, **keywords)
        if result.report.certificate is not None:
            result.report.certificate = replace(
                result.report.certificate, route="svd-float64", escalations=("gram-float32: error 1",)
            )
        return result

    monkeypatch.setattr(tiles, "merge_tensors", escalated)
    with caplog.at_level(logging.INFO, "r_tsvm_kernels"):
        merge_checkpoints(config, tmp_path / "out", threads=1)
    expected = "model.layers.0.mlp.weight: solved by svd-float64 after gram-float32: error 1"
    assert expected in messages(caplog, logging.INFO)
