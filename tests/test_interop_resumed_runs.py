"""Runs that stopped in PyTorch, timm or TensorFlow 1, and go on here. (The others are in the files of their readers.)"""

import pytest
from golden.checkpoints import case_name, HERE, recorded, ROWS, STOP
from recordings import check_goes_on, from_torch_layout, from_underscores, NAMES, others, state_dict

from rmsprop_jax import dialects, interop


READ = {
    "torch": (dialects.pytorch, lambda name: interop.from_pytorch(state_dict(name), NAMES, from_torch_layout)),
    "timm": (dialects.timm, lambda name: interop.from_timm(state_dict(name), NAMES, from_torch_layout)),
    "tensorflow1-graph": (
        dialects.tensorflow1,
        lambda name: interop.from_tensorflow1(recorded(name)["checkpoint"]["slots"], from_underscores, count=STOP),
    ),
}
CASES = [(name, options) for name in READ for options in ROWS[name].cases]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[case_name(*case) for case in CASES])
def test_resumes_a_recorded_run(name, options):
    dialect, read = READ[name]
    check_goes_on(dialect, options, read(case_name(name, options)), recorded(case_name(name, options)))


@pytest.mark.parametrize(("_", "optimizer", "forms"), others("torch"), ids=lambda x: x if isinstance(x, str) else "")
def test_other_optimizers_of_pytorch_are_refused(_, optimizer, forms):
    with pytest.raises(ValueError, match="not the checkpoint of RMSprop, but of"):
        interop.from_pytorch(forms["state_dict"], NAMES)


def test_every_recording_has_its_row():
    made = {case_name(name, options) for name, row in ROWS.items() for options in row.cases}
    made |= {f"{name},others" for name, row in ROWS.items() if row.others}
    assert {file.name.removesuffix(".json.gz") for file in (HERE / "checkpoints").iterdir()} == made
