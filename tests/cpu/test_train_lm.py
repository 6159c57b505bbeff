"""The language model of the benchmarks: same tokens for every run, losses that fall, its files."""

from dataclasses import replace

import pytest
import torch

from benchmarks import train_lm
from benchmarks.figures import HEAD_KEYS, Result
from benchmarks.train_lm import TINY, Curve, batches, read_curves, summary, train
from tests.refusals import as_typed, refusal

CPU = torch.device("cpu")
CONFIG = replace(TINY, layers=1, steps=12, every=6)


@pytest.fixture(scope="module")
def texts():
    return train_lm.standard_library()


def test_texts_are_large_and_apart(texts):
    training, validation = texts
    assert training.numel() > 5_000_000 and 100_000 < validation.numel() < training.numel() / 5
    assert training.dtype == torch.uint8 and int(training.max()) > 126


def test_every_run_sees_the_same_batches(texts):
    first, again, other = (list(batches(texts[0], CONFIG, 3, seed, CPU)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[0], first[1])
    assert first[0].shape == (CONFIG.sequences, CONFIG.length + 1)


@pytest.mark.parametrize("routing", ["top_k", "nr"])
def test_losses_fall_and_runs_repeat(texts, routing):
    curve = train(CONFIG, routing, 0, texts, CPU)
    assert list(curve.validation) == [6, 12] and len(curve.training) == 12
    assert curve.final < curve.validation[6] < curve.training[0] + 0.1
    assert train(CONFIG, routing, 0, texts, CPU) == curve


def test_rounding_is_in_the_training_only(texts):
    """Seeds decide the initialisation; routings differ in the training losses from the start."""
    curves = [train(replace(CONFIG, steps=2, tile=64), routing, 0, texts, CPU)
              for routing in ("top_k", "nr")]  # fmt: skip
    assert curves[0].training[0] != curves[1].training[0]
    model = train_lm.Model(CONFIG, "nr").eval()
    plain = train_lm.Model(CONFIG, "top_k").eval()
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(256, (2, CONFIG.length))
    backend = train_lm.KernelBackendMoE.torch
    assert torch.equal(model(ids, backend)[0], plain(ids, backend)[0])


def test_summary_compares_means_with_seeds():
    ends = {"top_k": (2.0, 2.2), "nr": (2.1, 2.2)}
    curves = [
        Curve(routing, seed, [], {5: 9.0, 10: end})
        for routing, pair in ends.items()
        for seed, end in enumerate(pair)
    ]
    found = summary(curves[::-1])
    assert found.rows == [
        ["nr", "2.1000", "2.2000", "2.1500"],
        ["top_k", "2.0000", "2.2000", "2.1000"],
    ]
    assert found.between == pytest.approx(0.05) and found.within == pytest.approx(0.2)
    # Variances 0.02 and 0.005 of two seeds each.
    assert found.error == pytest.approx(0.0125**0.5)
    assert summary(curves[:1]) == train_lm.Summary([["top_k", "2.0000", "2.0000"]], 0.0, 0.0, 0.0)


def test_runs_in_processes_equal_runs_in_turns(texts):
    config = replace(CONFIG, steps=2, every=1)
    runs = [("top_k", 0), ("nr", 1)]
    small = texts[0][:9_999], texts[1][:9_999]
    alone = list(train_lm.train_all(config, runs, small, CPU, 1))
    together = list(train_lm.train_all(config, runs, small, CPU, 2))
    assert sorted(together, key=lambda curve: curve.seed) == alone


def test_the_script_writes_curves(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_lm, "TINY", CONFIG)
    path = tmp_path / "lm.json"
    assert train_lm.main(["--steps", "4", "--seeds", "3", "--json", str(path)]) == 0
    assert "largest distance" in capsys.readouterr().out
    curves = read_curves(path)
    assert set(curves) == {
        (routing, "seed 3", kind)
        for routing in ("top_k", "nr")
        for kind in ("training", "validation")
    }
    assert curves["nr", "seed 3", "validation"][0] == [1, 2, 3, 4]
    assert any(row.metric == "lm/distance of means" for row in Result.read(path).rows)


def test_a_file_without_curves_is_refused(tmp_path):
    Result(dict.fromkeys(HEAD_KEYS)).write(tmp_path / "empty.json")
    with pytest.raises(SystemExit, match="no curves"):
        train_lm.main(["--plot", str(tmp_path / "empty.json"), str(tmp_path / "lm.svg")])
    with pytest.raises(SystemExit, match=r"that --json wrote here.*no\.json"):
        train_lm.main(["--plot", str(tmp_path / "no.json"), str(tmp_path / "lm.svg")])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--jobs", "0"], "positive integer"),
        (["--steps", "-1"], "positive integer"),
        (["--seeds", "-1"], "at least 0"),
        (["--routings", "foo"], "invalid choice: 'foo'"),
        (["--routings", "nr", "nr"], "--routings: value 2 is value 1 once more"),
        (["--json", "."], "is a directory"),
    ],
    ids=as_typed,
)
def test_options_that_cannot_work_are_refused(flags, says, capsys):
    assert says in refusal(train_lm.main, flags, capsys)
