"""What the scripts behind the emulator's figures refuse before they work."""

import json

import pytest

from benchmarks import emulator_hardware
from tests.calibration import calibration_kernel
from tests.calibration import run as calibration
from tests.emulator import evidence


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
