"""A run's configuration: as a tree, by flat names, as JSON and as flags, all the same."""

import dataclasses
import json
import re
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
from pydantic import Field

from pyro_nbvae.errors import InputError
from pyro_nbvae.study import plugins, training
from pyro_nbvae.study.cli import main
from pyro_nbvae.study.config import PRESETS, configure, from_json, to_json
from pyro_nbvae.study.folder import Run
from pyro_nbvae.study.tree import (
    AnnealedGumbelSoftmax,
    IntegerCounts,
    Kind,
    MonteCarloKL,
    Training,
    choices,
    options,
    replace,
)
from pyro_nbvae.study.variants import KINDS, VARIANTS, PoissonVAE, register_variant

CELLS = [(variant, preset) for variant in VARIANTS for preset in PRESETS]


def leaves(stored, place=()):
    """The places of a tree's values and parts, as tuples of keys."""
    for name, value in stored.items():
        yield (*place, name)
        if isinstance(value, dict):
            yield from leaves(value, (*place, name))


def changed(stored, place, change):
    """A copy of a tree in which a function has changed the part that holds a place."""
    stored = json.loads(json.dumps(stored))
    part = stored
    for name in place[:-1]:
        part = part[name]
    change(part, place[-1])
    return stored


# --- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "preset"), CELLS)
def test_a_configuration_comes_back_from_json_with_its_types(variant, preset):
    config = configure(variant, preset=preset)
    again = from_json(json.loads(json.dumps(to_json(config))))
    assert again == config and type(again.vae) is type(VARIANTS[variant])
    for name, parts in choices(config).items():
        for kind, part in parts.items():
            other = replace(config, **{name: kind})
            again = from_json(json.loads(json.dumps(to_json(other))))
            assert again == other and options(again)[name] == kind
            assert type(part) in {type(getattr(at, name, None)) for at in (again, again.vae)}


@pytest.mark.parametrize("variant", ["MC-G", "EX-C", "C-VAE"])
def test_what_is_wrong_in_json_is_named_by_its_place(variant):
    """Of each key: if it is missing, if another is beside it, if its value is of another type or none of the known."""
    stored = to_json(configure(variant))
    for place in leaves(stored):
        for change, what in (
            (lambda part, name: part.pop(name), ["Field required", "Unable to extract tag"]),
            (lambda part, name: part.update({name + "_": 1}), ["Unexpected keyword argument"]),
            (lambda part, name: part.update({name: [1]}), ["Input should be ", "Unable to extract", "Input tag"]),
        ):
            with pytest.raises(InputError) as error:
                from_json(changed(stored, place, change))
            first, _, message = str(error.value).splitlines()[0].partition(": ")
            names = first.rstrip("_").split(".")
            assert message.startswith(tuple(what)), (place, str(error.value))
            # tags of parts are among the names, and a missing tag is that of its part
            assert [n for n in names if n in place] == list(place if place[-1] in names else place[:-1])
            assert place[-1] in (*names, "kind")


@pytest.mark.parametrize(
    ("variant", "place", "value", "line"),
    [
        ("CMP", ("training", "lr"), 0, "training.lr: Input should be greater than 0"),
        ("CMP", ("training", "lr"), "1", "training.lr: Input should be a valid number"),
        ("CMP", ("training", "epochs"), 1.5, "training.epochs: Input should be a valid integer"),
        ("CMP", ("training", "validate"), 1, "training.validate: Input should be a valid boolean"),
        ("CMP", ("latents",), True, "latents: Input should be a valid integer"),
        ("CMP", ("seed",), 2**32, "seed: Input should be less than 4294967296"),
        ("CMP", ("encoder",), "resnet", "encoder: Input should be 'conv', 'mlp', 'linear', "),
        ("CMP", ("vae", "kind"), "mine", "vae: Input tag 'mine' found using 'kind' does not match any"),
        ("C-VAE", ("vae", "categories"), 1, "vae.categorical.categories: Input should be greater than or equal to 2"),
        ("EX-C", ("vae", "relaxation", "temperature"), 0.5, "temperature must be at most temperature_start (0.24)"),
    ],
)
def test_a_value_out_of_range(variant, place, value, line):
    with pytest.raises(InputError) as error:
        from_json(changed(to_json(configure(variant)), place, lambda part, name: part.update({name: value})))
    assert line in str(error.value).splitlines()[0]


def test_every_wrong_value_has_a_line(tmp_path):
    with pytest.raises(InputError) as error:
        configure("EX-C", temperature=-1, encoder="resnet", lr="fast", data=3)
    places = [line.partition(": ")[0] for line in str(error.value).splitlines()]
    relaxation = "vae.negative_binomial.relaxation.arrival"
    assert set(places) == {f"{relaxation}.temperature", "encoder", "training.lr", "data"}
    for stored in ([], None, "CMP"):
        with pytest.raises(InputError, match="config: Input should be an object"):
            from_json(stored)
    with pytest.raises(InputError, match="latents: Input should be a valid integer"):
        configure(latents=complex(3))
    assert configure(data=tmp_path / "x.npy").data == str(tmp_path / "x.npy")


# --- flat names ------------------------------------------------------------------------------------------------------


def test_options_are_replaced_by_name_wherever_they_are():
    config = configure("EX-C")
    for name, value in {
        "seed": 3,
        "lr": 0.5,
        "beta": 2.0,
        "temperature": 0.1,
        "prior_mean": 4.0,
        "kl_warmup": 1.0,
        "validate": True,
    }.items():
        other = replace(config, **{name: value})
        assert options(other) == options(config) | {name: value} != options(config)
        assert configure("EX-C", **{name: value}) == other
    for part, given in (("gumbel", "gumbel"), ("gumbel", AnnealedGumbelSoftmax(max_count=9))):
        other = replace(config, relaxation=given, temperature=0.5)
        assert other.relaxation.kind == part and other.relaxation.temperature == 0.5
        assert other.relaxation.max_count == getattr(given, "max_count", None)
    assert replace(VARIANTS["MC-C"], kl_samples=9).estimator == MonteCarloKL(kl_samples=9)
    assert replace(Training(), epochs=3) == Training(epochs=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1, "max_count": 3}, "unknown option colour, max_count: EX-C has anneal_epochs, batch_size, "),
        ({"relaxation": "cold"}, "unknown relaxation 'cold': choose from arrival, gumbel, integer, auto"),
        ({"relaxation": "integer", "temperature": 0.1}, "unknown option temperature"),
        ({"variant": "CMP"}, "unknown option variant"),  # the rest would still be EX-C
        ({"kind": "poisson"}, "unknown option kind"),
        ({"vae": PoissonVAE()}, "unknown option vae"),
        ({"temperature": 0.5}, r"temperature must be at most temperature_start \(0.24\), got 0.5"),
    ],
)
def test_what_cannot_be_replaced(changes, message):
    with pytest.raises(InputError, match=message):
        replace(configure("EX-C"), **changes)
    if "variant" not in changes:
        with pytest.raises(InputError, match=message):
            configure("EX-C", **changes)


def test_unknown_names():
    with pytest.raises(InputError, match=r"unknown variant 'NB': choose from MC-G, .*--import MODULE"):
        configure("NB")
    with pytest.raises(InputError, match="unknown preset 'nature': choose from default, published, paper"):
        configure(preset="nature")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_holds_where_nothing_else_is_given(preset):
    for variant in VARIANTS:
        found, settings = options(configure(variant, preset=preset)), PRESETS[preset]
        plain = {name: value for name, value in settings.items() if "." not in name}
        relaxation = found.get("relaxation")
        plain |= {n.split(".")[1]: v for n, v in settings.items() if n.startswith(f"{relaxation}.")}
        assert found.items() >= {name: value for name, value in plain.items() if name in found}.items()
        assert options(configure(variant, preset=preset, lr=0.7))["lr"] == 0.7
        counts = options(configure(variant, preset=preset, likelihood="poisson"))
        assert counts["loss"] == "nats" and counts["clip"] is None  # they have no squared errors


# --- flags -----------------------------------------------------------------------------------------------------------

# Options that a variant decides, and parts of one kind: neither is a flag.
FIXED = {"vae", "loss", "shared_dispersion", "covariates", "conditions", "given", "whole"}
PARTS = {"relaxation", "estimator", "prior", "likelihood"}


def listed(capsys, *flags):
    """The names of the flags that the help lists."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["train", *flags, "--help"])
    assert stop.value.code == 0
    found = re.findall(r"^\W{1,3}--([a-z][a-z-]*)", capsys.readouterr().out, re.MULTILINE)
    assert len(set(found)) == len(found)
    return {name.replace("-", "_") for name in found}


def flags_of(config):
    there = set(options(config)) - FIXED - (PARTS - set(choices(config)))
    return there | {"out", "resume", "preset"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_help_lists_the_options_of_the_tree_and_no_others(variant, capsys):
    assert listed(capsys, "--variant", variant) == flags_of(configure(variant))


@pytest.mark.parametrize("name", ["relaxation", "estimator", "likelihood", "preset"])
def test_flags_that_choose_parts_change_what_is_listed(name, capsys):
    plain = configure("MC-C")
    found = {}
    for kind in PRESETS if name == "preset" else choices(plain)[name]:
        found[kind] = listed(capsys, "--variant=MC-C", f"--{name}", kind)
        assert found[kind] == flags_of(configure("MC-C", **{name: kind}))
    if name == "relaxation":
        assert found["gumbel"] - found["arrival"] == {"max_count"}
        assert found["arrival"] - found["gumbel"] == {"indicator"}
        assert found["arrival"] - found["integer"] == {"temperature", "temperature_start", "anneal_epochs"} | {
            "indicator",
            "straight_through",
        }
    if name == "estimator":
        assert found["MonteCarloKL_ELBO"] - found["AnalyticKL_ELBO"] == {"kl_samples"}
        assert found["AnalyticKL_ELBO"] - found["Trace_ELBO"] == {"kl_warmup"}
    if name == "likelihood":
        assert found["gaussian"] - found["poisson"] == {"beta"}


@pytest.fixture
def commanded(monkeypatch, capsys):
    """The configuration that a command line gives to the training."""

    def config_of(*words):
        given = []
        with monkeypatch.context() as patch:
            patch.setattr(training, "train", lambda config, out, **_: given.append(config) or Run(out))
            main([*words, "--out", "run"])
        return given[0]

    return config_of


@pytest.mark.parametrize(("variant", "preset"), CELLS)
def test_the_command_gives_the_same_configuration(variant, preset, commanded):
    assert commanded("train", "--variant", variant, "--preset", preset) == configure(variant, preset=preset)


@pytest.mark.parametrize(
    "words",
    [
        "--variant EX-C --relaxation gumbel --temperature 0.5 --max-count 40 --prior-mean 3.0 --straight-through",
        "--preset paper --variant=MC-C --relaxation=gumbel --temperature-start=2.0 --kl-samples 7 --kl-warmup 0.0",
        "--variant P-VAE --estimator MonteCarloKL_ELBO --kl-samples 3 --likelihood poisson --data some/where.npy",
        "--preset published --likelihood negative_binomial --clip 3.0 --latents 5 --lr-schedule linear",
        "--variant P-NB --relaxation auto --prior-lr-multiplier 2.0 --encoder mlp --decoder released_linear",
        "--variant C-VAE --categories 4 --anneal-epochs 3.0 --beta 0.5 --seed 7 --device cpu --data-root here",
        "--variant L-VAE --validate --patience 3 --tensorboard --mixed-precision --epochs 2 --lr 0.5 --batch-size 9",
        "--variant G-VAE --estimator RenyiELBO --train-size 100 --deterministic --epochs None",
        "--relaxation integer --variant DS-C --preset published --relaxation arrival --indicator smoothstep",
    ],
)
def test_flags_give_the_same_configuration_as_names(words, commanded):
    changes = {}
    for flag, value in re.findall(r"--([\w-]+)(?:[ =](?!--)(\S+))?", words):
        try:
            changes[flag.replace("-", "_")] = json.loads(value or "true")
        except ValueError:
            changes[flag.replace("-", "_")] = None if value == "None" else value
    assert commanded("train", *words.split()) == configure(**changes)
    assert len(changes) >= 4


# --- a user's own ----------------------------------------------------------------------------------------------------

MODULE = '''
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from pyro_nbvae.study.tree import BY_KIND, Kind
from pyro_nbvae.study.variants import PoissonVAE, register_variant


@dataclass(frozen=True, kw_only=True)
class Warm:
    kind: Kind[Literal["warm"]] = "warm"
    degrees: Annotated[float, Field(gt=0, le=100)] = 20.0
    """degrees above zero"""


@dataclass(frozen=True, kw_only=True)
class Cold:
    kind: Kind[Literal["cold"]] = "cold"


@dataclass(frozen=True, kw_only=True)
class MyVAE(PoissonVAE):
    """A VAE of my own."""

    kind: Kind[Literal["my_vae"]] = "my_vae"
    width: Annotated[int, Field(ge=1)] = 5
    """width of what is mine"""
    weather: Annotated[Warm | Cold, BY_KIND] = field(default_factory=Warm)


register_variant("MINE", MyVAE())
register_variant("MINE-9", MyVAE(width=9, weather=Cold()))
'''


@pytest.fixture
def own_module(tmp_path, monkeypatch, own_variants):
    """The name of a module that registers variants; its folder is the working directory."""
    (tmp_path / "my_family.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(plugins, "imported", list(plugins.imported))
    yield "my_family"
    sys.modules.pop("my_family", None)


def test_a_variant_of_a_users_own(own_module, commanded, capsys):
    imported = ["--import", own_module, "train"]
    with pytest.raises(SystemExit):
        main([*imported, "--variant", "MINE", "--help"])
    helped = " ".join(capsys.readouterr().out.split())
    for words in ("--width INT", "width of what is mine (default: 5)", "--degrees FLOAT", "degrees above zero"):
        assert words in helped
    assert re.search(r"--weather \{warm,cold\}.*\(default: warm\)", helped)
    assert listed(capsys, "--variant", "MINE") == flags_of(configure("MINE"))
    assert listed(capsys, "--variant", "MINE-9") == listed(capsys, "--variant", "MINE") - {"degrees"}

    words = ["--variant", "MINE", "--width", "7", "--weather", "warm", "--degrees", "30", "--relaxation", "integer"]
    config = commanded(*imported, *words)
    assert config == configure("MINE", width=7, degrees=30.0, relaxation=IntegerCounts())
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    assert type(config.vae) is sys.modules[own_module].MyVAE
    assert configure("MINE-9").vae.width == 9 and options(configure("MINE-9"))["weather"] == "cold"
    with pytest.raises(InputError, match=r"vae.my_vae.weather.warm.degrees: Input should be less than or equal to 100"):
        configure("MINE", degrees=200.0)


def test_the_run_of_a_users_variant_needs_its_module(own_module, capsys):
    sizes = ["--train-size=50", "--latents=3", "--encoder=linear", "--decoder=linear", "--epochs=1", "--device=cpu"]
    main(["--import", own_module, "train", "--variant", "MINE", "--width=7", *sizes, "--out", "run"])
    config, model, _ = Run("run").load("cpu")
    assert config.vae.width == 7 and config.vae.weather.degrees == 20 and model.latents == 3
    main(["generate", "run", "--count", "2"])

    for table in (VARIANTS, KINDS):  # as in another process
        for name in [name for name, one in table.items() if "MyVAE" in f"{one}"]:
            del table[name]
    sys.modules.pop(own_module)
    capsys.readouterr()
    for command in (["generate", "run"], ["evaluate", "run"]):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 2
        first, second = capsys.readouterr().err.splitlines()
        assert first.startswith("nbvae: run/config.json: vae: Input tag 'my_vae'")
        assert second.startswith("vae: a variant of your own is known after --import MODULE")
    main(["--import", own_module, "generate", "run", "--count", "2"])


def test_variants_are_told_apart_by_their_kind(own_variants):
    @dataclass(frozen=True, kw_only=True)
    class First(PoissonVAE):
        kind: Kind[Literal["first"]] = "first"
        share: Annotated[float, Field(ge=0, le=1)] = 0.5

    @dataclass(frozen=True, kw_only=True)
    class Second(PoissonVAE):
        kind: Kind[Literal["first"]] = "first"

    register_variant("A", First())
    register_variant("B", First(share=0.1))
    register_variant("A", First(share=0.2))  # replaced
    assert VARIANTS["A"].share == 0.2 and KINDS["first"] is First
    with pytest.raises(InputError, match="kind 'first' of Second is that of First: give it another"):
        register_variant("C", Second())
    assert "C" not in VARIANTS


def test_configurations_are_frozen_and_comparable():
    config = configure("EX-C")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3
    assert hash(config) == hash(configure("EX-C")) and config != configure("EX-C", seed=3)
