"""The list of faults fits the code as it is today, and the tests catch a sample of them."""

import pytest
from faults import FAULTS, ROOT, Fault, main, stale

SAMPLE = ["loss-not-weighted", "guidance-on-the-way-back", "muon-momentum", "batch-without-its-plan"]


def test_each_fault_has_its_line_and_changes_it():
    assert [says for name in FAULTS if (says := stale(name))] == [] and len(FAULTS) > 40
    for fault in FAULTS.values():
        assert (ROOT / fault.tests.split()[0]).is_file() and "\n" not in fault.old + fault.new


def test_a_list_that_no_longer_fits_is_told(monkeypatch):
    gone = Fault("minimedshift/flow.py", "tests/test_flow.py", "no such line", "x")
    monkeypatch.setitem(FAULTS, "gone", gone)
    monkeypatch.setitem(FAULTS, "same", gone._replace(old="return xt, ut", new="return xt, ut"))
    monkeypatch.setitem(FAULTS, "twice", gone._replace(old='"""', new="x"))
    assert "0 lines" in stale("gone") and "changes nothing" in stale("same") and "lines" in stale("twice")
    with pytest.raises(SystemExit, match="gone: the list is stale"):
        main(["gone"])
    with pytest.raises(SystemExit, match="no such fault: rust"):
        main(["rust"])


@pytest.mark.slow
def test_a_sample_is_caught_and_what_changes_nothing_is_not(monkeypatch, capsys):
    assert main(SAMPLE) == 0
    assert capsys.readouterr().out.count("caught  ") == len(SAMPLE)
    fault = FAULTS["loss-not-weighted"]
    monkeypatch.setitem(FAULTS, "harmless", fault._replace(new=fault.old + "  # a remark"))
    assert main(["harmless"]) == 1 and "NOT CAUGHT  harmless" in capsys.readouterr().out
