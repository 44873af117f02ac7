"""Runs that stopped in another framework and go on here, from recorded checkpoints."""

import pytest
import resume
from resume import (
    case_name,
    CASES,
    convert,
    dialect_of,
    difference,
    END,
    limit,
    ORIGIN,
    RECORDED,
    recorded,
    SOURCES,
    STOP,
)


IDS = [case_name(*case) for case in CASES]


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_resumes_a_recorded_run(name, options):
    run, source = recorded(name, options), SOURCES[name]
    state = source.read(run.checkpoint)
    assert state.count == STOP
    assert (state.mu is None, state.trace is None) == ("centered" not in options, "momentum" not in options)
    end, _ = resume.run_ours(dialect_of(source, name, options), state, run.middle, STOP, END)
    assert difference(end, run.end) < limit(name, options)
    # Without the state it is another run: the test can fail.
    afresh, _ = resume.run_ours(
        dialect_of(source, name, options),
        dialect_of(source, name, options).init(convert(ORIGIN))._replace(count=state.count),
        run.middle,
        STOP,
        END,
    )
    assert difference(afresh, run.end) > 1e-4


def test_every_recorded_run_is_read():
    assert {path.stem for path in RECORDED.glob("*.npz")} == set(IDS)
