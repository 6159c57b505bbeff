"""The scripts behind the emulator's figures: what they refuse, count and keep."""

import json

import numpy as np
import pytest

from benchmarks import emulator_hardware, figures, report
from tests.calibration import calibration_kernel
from tests.calibration import run as calibration
from tests.emulator import Policy, evidence, ptx
from tests.emulator.program import Program
from tests.emulator.snippet import launch_ptx, snippet_text
from tests.emulator.subjects import Subject, problems


class Relay:
    """Two warps exchange two words a thread through shared memory, with a fence that none needs."""

    BODY = """
mov.u32 %r1, dynamic;
mad.lo.u32 %r1, %r0, 8, %r1;
st.shared.u32 [%r1], %r0;
st.shared.u32 [%r1+4], %r0;
fence.proxy.async;
fence.proxy.async;
bar.sync 0;
xor.b32 %r4, %r1, 256;
ld.shared.v2.u32 {%r2, %r3}, [%r4];
mad.wide.u32 %d8, %r0, 8, %d0;
st.global.v2.u32 [%d8], {%r2, %r3};
setp.ge.u32 %p1, %r0, 0;
@%p1 bra END;
bar.sync 0;
END:
"""

    def __init__(self):
        self.load(snippet_text(self.BODY, arrays=1))

    def load(self, text):
        self.ptx_text = text
        self.programs = {n: Program(k) for n, k in ptx.parse(text).items()}

    def run(self, seed, max_steps):
        out = np.zeros((64, 2), np.uint32)
        (program,) = self.programs.values()
        options = {"policy": Policy(seed), "smem": 512, "max_steps": max_steps}
        self.machine = launch_ptx(program, out, block=(64, 1, 1), **options)
        right = (out == np.arange(64)[:, None] ^ 32).all()
        return "" if right else "words are wrong", set(self.machine.warnings)


def relay(name="relay", problem="64 threads"):
    emulator = Relay()
    return Subject(name, "sm_90a", problem, emulator, emulator.run)


def run_evidence(monkeypatch, path, *options, kernels=(relay,)):
    monkeypatch.setattr(evidence, "subjects", lambda arch: kernels)
    command = ["evidence", "--arch", "sm_90a", "--json", str(path), *options]
    monkeypatch.setattr("sys.argv", command)
    assert evidence.main() == 0
    return json.loads(path.read_text())


def test_an_unknown_configuration_is_refused(monkeypatch, capsys):
    with pytest.raises(ValueError, match="no configuration 'b-rows-3cta'.*b-rows-2cta"):
        calibration_kernel("b-rows-3cta")
    monkeypatch.setattr("sys.argv", ["run", "--only", "nosuch"])
    with pytest.raises(SystemExit):
        calibration.main()
    assert "has 'nosuch' in its name" in capsys.readouterr().err


def test_evidence_of_no_kernel_leaves_the_file_alone(monkeypatch, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"commit": "1", "architectures": {}}))
    before = path.read_text()
    monkeypatch.setattr(evidence, "subjects", lambda arch: [])
    monkeypatch.setattr("sys.argv", ["evidence", "--only", "nosuch", "--json", str(path)])
    with pytest.raises(SystemExit, match="--only nosuch: no kernel of sm_90a"):
        evidence.main()
    assert path.read_text() == before


def test_evidence_keeps_entries_with_their_commit_and_new_explanations(tmp_path, monkeypatch):
    names = {"arch": "sm_90a", "kernel": "up", "kind": "k", "detail": "", "ptx": "p"}
    mutants = [{**names, "caught": "race", "seeds": 1}, {**names, "caught": "missed", "seeds": 6}]
    entry = {"summary": {"places": 2}, "mutants": mutants}
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"commit": "1", "architectures": {"sm_90a": entry}}))
    said = {evidence.key_of(mutants[1]): "No effect: because"}
    monkeypatch.setattr(evidence, "explanations", lambda: said)
    kept = evidence.earlier(path)["sm_90a"]
    assert kept["commit"] == "1" and kept["mutants"][1]["explanation"] == "No effect: because"
    assert kept["summary"]["places"] == 2 and kept["summary"]["without_effect"] == 1
    assert kept["summary"]["share_caught"] == 0.5


def test_places_are_drawn_from_left_out_or_never_executed():
    subject = relay()
    lines = evidence.baseline(subject).lines
    found, left_out, not_executed = evidence.mutants_by_kind(subject, lines)
    counts = {kind: len(mutants) for kind, mutants in found.items()}
    assert counts == {"shared store removed": 2, "barrier removed": 1, "by one lane": 1}
    assert not_executed == 1
    assert [place["rule"] for place in left_out] == ["the same fence or wait stands beside it"] * 2
    first = subject.emulator.ptx_text.splitlines().index("fence.proxy.async;") + 1
    assert [place["line"] for place in left_out] == [first, first + 1]
    assert {place["ptx"] for place in left_out} == {"fence.proxy.async"}
    assert {place["kind"] for place in left_out} == {"proxy fence removed"}
    # nothing is planted where nothing ran
    none, left_out, not_executed = evidence.mutants_by_kind(subject, set())
    assert not none and not left_out and not_executed == 7


def test_draws_share_no_mutant_and_take_kernels_in_turn():
    def places():
        many = [f"a{i}" for i in range(5)]
        return {"one": {"k": many, "rare": ["r"]}, "two": {"k": ["b0", "b1"]}}

    left = places()
    draws = [evidence.take(left, 3, draw) for draw in (1, 2, 3)]
    taken = [[mutant for mutants in draw.values() for mutant in mutants] for draw in draws]
    assert [len(mutants) for mutants in taken] == [4, 3, 1]
    assert sorted(sum(taken, [])) == ["a0", "a1", "a2", "a3", "a4", "b0", "b1", "r"]
    assert all(len(draw["two"]) == 1 for draw in draws[:2])  # not all of one kernel
    again = places()
    assert [evidence.take(again, 3, draw) for draw in (1, 2, 3)] == draws


def test_evidence_is_written_after_each_draw(monkeypatch, tmp_path, capsys):
    path = tmp_path / "result.json"
    written = []
    monkeypatch.setattr(evidence, "explanations", dict)
    write = evidence.write

    def noted(*arguments):
        write(*arguments)
        written.append(json.loads(path.read_text()))

    monkeypatch.setattr(evidence, "write", noted)
    content = run_evidence(monkeypatch, path, "--per-kind", "1")
    assert len(written) == 2 and written[1] == content
    for i, result in enumerate(written):
        mutants = result["architectures"]["sm_90a"]["mutants"]
        assert [m["draw"] for m in mutants] == [1, 1, 1, 2][: 3 + i]
        assert {m["problem"] for m in mutants} == {"64 threads"}
    first, both = (result["architectures"]["sm_90a"]["summary"] for result in written)
    assert (first["mutants"], first["caught"], first["unexplained"]) == (3, 2, 1)
    assert (both["mutants"], both["caught"], both["unexplained"]) == (4, 3, 1)
    assert [draw["mutants"] for draw in both["draws"]] == [3, 1]
    assert both["places"] == 4 and both["not_executed"] == 1
    # the sentence that is asked for, and then given
    (said,) = [
        x for x in capsys.readouterr().out.splitlines() if x.startswith("without a sentence")
    ]
    key = json.loads(said.partition(": ")[2])
    fence = "by one lane | proxy fence | fence.proxy.async"
    assert key == f"sm_90a | relay | 64 threads | {fence}"
    monkeypatch.setattr(evidence, "explanations", lambda: {key: "No effect: no TMA."})
    explained = run_evidence(monkeypatch, path, "--explain")
    assert "sentence" not in capsys.readouterr().out
    summary = explained["architectures"]["sm_90a"]["summary"]
    assert summary["without_effect"] == 1 and summary["unexplained"] == 0
    assert {k: v for k, v in explained.items() if k not in ("rows", "architectures")} == {
        k: v for k, v in content.items() if k not in ("rows", "architectures")
    }


def test_an_explanation_is_lost_with_its_problem_and_with_its_code():
    names = ("arch", "kernel", "problem", "kind", "detail", "ptx")
    entry = {name: name for name in names}
    keys = {evidence.key_of(entry | {name: "other"}) for name in names}
    assert len(keys | {evidence.key_of(entry)}) == 1 + len(names)


def test_what_the_emulator_refuses_is_not_caught():
    subject = relay()
    unchanged = evidence.baseline(subject)
    text = subject.emulator.ptx_text
    mutant = evidence.Mutation("k", "", text.replace("bar.sync 0", "fence.nosuch"), 1, 1)
    refused = evidence.trial(subject, mutant, unchanged)
    assert refused["caught"] == "refused" and "fence.nosuch" in refused["report"]

    def refuses(seed, max_steps):
        raise ptx.PtxError("not at run time either")

    late = Subject("relay", "sm_90a", "", subject.emulator, refuses)
    mutant = evidence.Mutation("k", "", text, 1, 1)
    assert evidence.trial(late, mutant, unchanged)["caught"] == "refused"
    missed = evidence.trial(subject, mutant, unchanged)
    assert missed["caught"] == "missed" and missed["seeds"] == len(evidence.SEEDS)
    caught = {"caught": "race", "seeds": 1}
    entries = [{"kind": "k", "kernel": "x"} | x for x in (refused, missed, caught)]
    entries[1]["explanation"] = "No effect: it is the same text"
    totals = evidence.totals(entries)
    assert (totals["mutants"], totals["caught"], totals["refused"]) == (3, 1, 1)
    assert totals["share_caught_of_those_with_effect"] == 0.5
    assert totals["by_first_seed"] == 1


def planted(monkeypatch, tmp_path, *options):
    """The Figures of one run, whose missed mutant is explained."""
    monkeypatch.setattr(evidence, "key_of", lambda entry: "the")
    monkeypatch.setattr(evidence, "explanations", lambda: {"the": "No effect: no TMA."})
    run_evidence(monkeypatch, tmp_path / "x.json", "--per-kind", "1", *options)
    return figures.Figures(tmp_path)


def test_the_table_shows_each_draw_and_its_sizes(monkeypatch, tmp_path):
    table = report.TABLES["emulator"](planted(monkeypatch, tmp_path))
    assert "found | 3 of 4; 1 without effect | – | – |" in table
    assert "of these, draw 1 | 2 of 3; 1 without effect |" in table
    assert "of these, draw 2 | 1 of 1 |" in table
    assert "4 of 4 places on sm_90a (3 kinds, up to 1 of each in each of 2 draws)." in table


def test_the_table_of_one_draw(monkeypatch, tmp_path):
    table = report.TABLES["emulator"](planted(monkeypatch, tmp_path, "--draws", "1"))
    assert "found | 2 of 3; 1 without effect |" in table and "draw 1" not in table
    assert "3 of 4 places on sm_90a (3 kinds, up to 1 of each)." in table


def test_samples_of_unknown_size_are_refused(monkeypatch, tmp_path):
    planted(monkeypatch, tmp_path)
    content = json.loads((tmp_path / "x.json").read_text())
    content["rows"] = [r for r in content["rows"] if r["metric"] != "mutations/sm_90a/places"]
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="sm_90a have no figure for places;.*--explain"):
        report.TABLES["emulator"](figures.Figures(tmp_path))


def committed():
    """The entries of the result file that the README's table is made of."""
    path = max(figures.RESULTS.glob("*-emulator-mutations.json"))
    return json.loads(path.read_text())["architectures"]


def test_each_mutant_that_the_committed_run_missed_is_explained_and_no_other():
    entries = committed()
    missed = [m for e in entries.values() for m in e["mutants"] if m["caught"] == "missed"]
    said = evidence.explanations()
    assert set(said) == {evidence.key_of(m) for m in missed}
    assert all(m["explanation"] == said[evidence.key_of(m)] for m in missed), "run --explain"
    assert all(text.startswith(evidence.REASONS) and len(text) > 40 for text in said.values())


def test_the_committed_run_is_of_the_present_problems():
    for arch, entry in committed().items():
        ran = {m["kernel"]: m.get("problem") for m in entry["mutants"]}
        assert ran.items() <= problems(arch).items(), f"run --arch {arch} again"


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_evidence_keeps_no_entries_of_another_file(tmp_path, content):
    path = tmp_path / "result.json"
    assert evidence.earlier(path) == {}
    path.write_text(content)
    with pytest.raises(SystemExit, match="no result of this script"):
        evidence.earlier(path)


def test_the_head_names_no_place_of_this_machine(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/tests/emulator/evidence.py", "--arch", "sm_90a"])
    assert evidence.start()["command"] == "python -m tests.emulator.evidence --arch sm_90a"


def test_a_damaged_recording_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no outputs.npz and no head.json"):
        emulator_hardware.Recording(tmp_path)
    (tmp_path / emulator_hardware.OUTPUTS).write_text("x")
    (tmp_path / emulator_hardware.HEAD).write_text("{}")
    with pytest.raises(SystemExit, match="no whole recording"):
        emulator_hardware.Recording(tmp_path)
