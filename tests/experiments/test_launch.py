"""Recipes: every one parses, and what is wrong with one is said in a line."""

from pathlib import Path

import gin
import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import launch
from interns1pro_jax.config import ModelConfig
from interns1pro_jax.data.records import DataError
from interns1pro_jax.train import aot
from interns1pro_jax.train.watchdog import INTERRUPTED

RECIPES = sorted((launch.ROOT / "configs" / "recipes").glob("*.gin"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse_and_say_what_they_are(recipe):
    gin.parse_config_file(str(recipe))
    model = gin.get_configurable("ModelConfig")()
    # The one recipe whose model has yet to get its groups.
    assert type(model) is ModelConfig and model.text.router_n_groups == (1 if recipe.stem == "expansion_study" else 8)
    head = recipe.read_text()[:1000]
    assert all(word in head for word in ("# What:", "# Command:", "# Hardware:"))


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("LoopConfig.step = 3", "doesn't have a parameter named 'step'"),
        ("Loop.steps = 3", "No configurable matching 'Loop'"),
        ("LoopConfig.steps =", "Unable to parse value"),
        ("include 'configs/recipes/absent.gin'", "absent.gin"),
    ],
)
def test_wrong_bindings_end_with_one_line(binding, message):
    with pytest.raises(SystemExit) as stop:
        launch.parse([str(RECIPES[0])], [binding])
    assert message in str(stop.value.code)


def test_an_absent_recipe_is_named_with_those_there_are():
    with pytest.raises(SystemExit, match=r"there is no recipe configs/recipes/absent\.gin; configs/recipes has .*demo\.gin"):
        launch.parse(["configs/recipes/absent.gin"], [])


def test_absent_data_ends_a_run_with_one_line(tmp_path):
    launch.parse([str(launch.ROOT / "configs/recipes/demo.gin")], [f"Corpus.directory = '{tmp_path}'"])
    with pytest.raises(SystemExit, match=rf"^error: {tmp_path}/tokenizer\.json does not exist"):
        launch.run(tmp_path)


def test_an_impossible_mesh_ends_a_run_with_one_line(tmp_path):
    launch.parse([str(launch.ROOT / "configs/recipes/demo.gin")], ["MeshConfig.expert = 16"])
    with pytest.raises(SystemExit, match=r"^error: the mesh data=1 x fsdp=1 x context=1 x expert=16 needs 16 devices, but 8 are"):
        launch.run(tmp_path)


def test_unwritable_workdir_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    launch.parse([str(launch.ROOT / "configs/recipes/demo.gin")], [])
    with pytest.raises(SystemExit, match=f"error: .*{blocked}"):
        launch.run(Path(blocked) / "run")


@pytest.mark.parametrize(
    ("message", "ending"),
    [("INTERNAL: a link is down", SystemExit), ("RESOURCE_EXHAUSTED: out of memory", jax.errors.JaxRuntimeError)],
)
def test_a_device_that_fails_ends_a_run_to_be_started_again_unless_it_would_fail_again(tmp_path, monkeypatch, capsys, message, ending):
    def fails(*_):
        raise jax.errors.JaxRuntimeError(message)

    launch.parse([str(launch.ROOT / "configs/recipes/demo.gin")], [])
    monkeypatch.setattr(launch, "launch", fails)
    with pytest.raises(ending) as error:
        launch.run(tmp_path)
    if ending is SystemExit:
        assert error.value.code == INTERRUPTED and message in capsys.readouterr().err


def test_what_was_being_done_is_part_of_the_line(tmp_path, monkeypatch):
    def fails(*_):
        error = DataError("a record is damaged")
        error.add_note("while preparing batch 7")
        raise error

    launch.parse([str(launch.ROOT / "configs/recipes/demo.gin")], [])
    monkeypatch.setattr(launch, "launch", fails)
    with pytest.raises(SystemExit, match=r"^error: a record is damaged \(while preparing batch 7\)$"):
        launch.run(tmp_path)


CONTRADICTIONS = {
    "devices": ("pretrain_v5p_512", ["MeshConfig.fsdp = 32"], "fsdp=32 x context=1 x expert=8 needs 256 devices, but 512 are available"),
    "experts": ("pretrain_v5p_512", ["MeshConfig.expert = 16", "MeshConfig.fsdp = 32"], "expert=16 must divide router_n_groups=8"),
    "batch": ("pretrain_v5p_512", ["PipelineConfig.batch_size = 1000"], "size 1000 .* does not divide over the mesh axes"),
    "topology": ("pretrain_v5p_512", ["MeshConfig.topology = 'v5p:8x8x8x8'"], "libtpu does not know the topology 'v5p:8x8x8x8'"),
    "memory": (
        "pretrain_v6e_1024",
        ["MeshConfig.slices = 1", "MeshConfig.fsdp = 32", "OptimizerConfig.moment_dtype = 'float32'"],
        r"parameters, gradients and optimizer alone need 5\d\.\d GiB of each of 256 devices, which have 31.25",
    ),
    "sequence": (
        "text_v5p_1024",
        ["MeshConfig.fsdp = 32", "MeshConfig.context = 4", "RowSize.tokens = 4098"],
        r"'sequence' of size 4098 .* does not divide over the mesh axes context=4",
    ),
    "sequence in chunks": (
        "text_v5p_1024",
        ["MeshConfig.fsdp = 32", "MeshConfig.context = 4", "RowSize.tokens = 4092"],
        "rows of 4092 tokens do not divide into 8 chunks, two for each device of the mesh axis context=4",
    ),
    "tokens": (
        "text_v5p_1024",
        ["StepConfig.moe_chunks = 3"],
        r"moe_chunks=3: the 4096 tokens of a device \(1024 rows of 4096 on 1024 x 1 devices\) do not divide into 3 multiples of 128",
    ),
    "microbatches": (
        "text_v5p_1024",
        ["StepConfig.microbatches = 2"],
        r"microbatches=2: an array of 1024 rows .* on each of 1024 devices .* must be a multiple of 2048",
    ),
    "dtypes": ("text_v5p_1024", ["OptimizerConfig.stochastic_rounding = False"], "parameters in bfloat16 cannot be trained"),
    "options": ("text_v5p_1024", ["StepConfig.remat = 'some'"], r"StepConfig\.remat='some' is unknown; use one of none, full"),
}


@pytest.mark.skipif(not aot.can_compile(), reason="the devices of a TPU pod come from libtpu (Linux on x86-64)")
@pytest.mark.parametrize("contradiction", CONTRADICTIONS)
def test_compile_only_refuses_contradictions_at_once(tmp_path, monkeypatch, contradiction):
    """The command ends with one line that has the numbers, and nothing was compiled."""
    recipe, params, message = CONTRADICTIONS[contradiction]
    monkeypatch.setattr(launch.bindings, "register", lambda: None)  # they are
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_: pytest.fail("something was compiled"))
    flags.FLAGS.mark_as_parsed()
    given = dict(gin_file=[f"configs/recipes/{recipe}.gin"], gin_param=params, workdir=str(tmp_path), compile_only=True)
    with flagsaver.flagsaver(**given), pytest.raises(SystemExit, match=f"^error: .*{message}") as stop:
        launch.main(["launch"])
    assert "\n" not in str(stop.value.code)
