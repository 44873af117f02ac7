"""Programs for a TPU, compiled without one. `.ci/run tpu` installs the compiler; conftest.py leaves this file out elsewhere."""

import json
import pathlib

import jax
import pytest
import stacked
from accelerators import compiled, count, on_mesh, one_device, step_of, stepped, updates, updates_of_all, with_sharding


SHAPES = [(512, 1024), (3, 3, 64, 128), (5, 1000), (1000,), ()]


@pytest.mark.parametrize(
    "name",
    [
        "ours, float32 state, plain",
        "ours, uint8 state, plain",
        "ours, uint8 state, momentum",
        "ours, bfloat16 state, centered",
        "ours, three bytes",
        "ours, four bytes",
    ],
)
def test_an_update_moves_each_array_once(name):
    tx, dtype, _ = updates_of_all()[name]
    params = with_sharding([jax.ShapeDtypeStruct(shape, dtype) for shape in SHAPES], one_device("v5e"))
    state = with_sharding(jax.eval_shape(tx.init, params), one_device("v5e"))
    found = count(compiled(step_of(tx), params, state, params)[0])
    assert found.kernels == len([shape for shape in SHAPES if shape])
    assert found.copies == found.collectives == 0
    arrays = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, params, params, state, state)))
    assert arrays <= found.moved <= found.floor


@pytest.mark.parametrize("layout", ["FSDP", "both"])
@pytest.mark.parametrize("name", ["ours, uint8 state, momentum", "ours, four bytes"])
def test_a_mesh_sends_nothing_and_the_state_lies_as_the_parameters(layout, name):
    row = on_mesh("v5e:4x4", layout, name)
    assert row["sent by init"] == row["sent by update"] == 0
    assert row["kept by jit(init)"] == row["kept by update"] == row["arrays"] == 8


def test_what_fails_these_tests_is_seen():
    x = with_sharding(jax.ShapeDtypeStruct((512, 1024), "float32"), one_device("v5e"))
    swapped = count(compiled(lambda x, y: (y, x), x, x)[0])
    assert swapped.copies >= 2
    x = with_sharding(jax.ShapeDtypeStruct((4096, 4096), "float32"), one_device("v5e"))
    normed = count(compiled(lambda x, y: (x / (x + y).max(), y / (x - y).max()), x, x)[0])
    assert normed.kernels >= 3
    assert normed.moved >= 1.4 * normed.floor


def test_instructions_are_counted():
    x = with_sharding(jax.ShapeDtypeStruct((4096, 4096), "float32"), one_device("v5e"))
    few, many = (count(compiled(lambda x, y, n=n: (x + y**n, y), x, x)[0]).instructions for n in (2, 30))
    assert 0 < few < many


NAMES = ["ours, float32 state, plain", "ours, uint8 state, momentum", "ours, three bytes", "ours, four bytes"]


@pytest.mark.parametrize("name", NAMES)
def test_arithmetic_is_no_more_than_the_page_says(name):
    content = json.loads((pathlib.Path(__file__).parent / "benchmarks" / "results" / "accelerators.json").read_text())
    (row,) = [x for x in content["updates"] if (x["chip"], x["layout"], x["update"]) == ("v5e", "16M", name)]
    (new,) = updates("v5e", "16M", [name])
    assert new["bundles per 1024"] <= 1.03 * row["bundles per 1024"]
    assert new["moved / floor"] <= 1
    assert new["kernels per leaf"] == 1
    assert new["copies"] == new["temporary bytes per parameter"] == 0


@pytest.mark.usefixtures("users_climate")
def test_the_step_inside_the_backward_pass_keeps_no_gradients_of_all_layers():
    """105 million parameters. With the gradients of all layers there are 2.58 bytes more for each."""
    size = stacked.Size(layers=8, width=1024, heads=16, length=256, vocabulary=4096)
    row = stepped("v5e", "ours, three bytes", inside=True, size=size)
    assert row["parameters and state"] < 3.01
    assert row["all else"] < 0.2
    assert row["copies of stacks"] == 0
    assert row["matrix products"] == 26  # as many as with jax.checkpoint
