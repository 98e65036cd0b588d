"""Nothing that comes from elsewhere runs as code here, and no key leaves."""

import ast
import json
import pickle
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

from tests.endpoint import Endpoint
from tests.training import EXPERT, POLICY, QUICKSTART, make_trainer, path_dataset
from trl_selective import SelectiveGuidanceGRPOConfig
from trl_selective.experts import EndpointSource, ExpertServer, ExpertServerError, Sampling, endpoint_client

ROOT = QUICKSTART.parents[1]
SOURCES = [path for folder in ("trl_selective", "recipes") for path in sorted((ROOT / folder).rglob("*.py"))]
RECIPES = str(QUICKSTART.parent)


@pytest.fixture
def recipe(monkeypatch):
    """The names of a script, as `python recipes/NAME.py` would define them."""
    monkeypatch.setattr(sys, "path", [RECIPES, *sys.path])
    return lambda name: runpy.run_path(f"{RECIPES}/{name}.py")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ---- Code of strangers --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stranger(tmp_path):
    """A folder whose model and tokenizer come with code, and the file that this code leaves when it runs."""
    folder, mark = tmp_path / "stranger", tmp_path / "it-ran"
    for part in (AutoModelForCausalLM, AutoTokenizer):
        part.from_pretrained(EXPERT).save_pretrained(folder)
    classes = {
        "config.json": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"},
        "tokenizer_config.json": {"AutoTokenizer": ["own.Own", None]},
    }
    for name, auto_map in classes.items():
        settings = json.loads((folder / name).read_text()) | {"auto_map": auto_map, "model_type": "own"}
        (folder / name).write_text(json.dumps({**settings, "tokenizer_class": "Own"}))
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\nraise ValueError('it ran')\n")
    return str(folder), mark


def of_trainer(folder, recipe, tmp_path, **changes):
    make_trainer(tmp_path / "out", **{"max_steps": 1, **changes})


def of_evaluation(folder, recipe, tmp_path, what):
    script = recipe("evaluate")
    model = script["ModelArguments"](model_name_or_path=folder)
    script[what](model, *(["float32"] if what == "load_model" else []))


def of_collection(folder, recipe, tmp_path):
    script = recipe("collect_expert_completions")
    arguments = script["CollectArguments"](expert_model_name_or_path=folder, output_file="out.jsonl")
    script["local_source"](script["ScriptArguments"](), arguments, Sampling())


def of_recipe(folder, recipe, tmp_path):
    script = recipe("selective_grpo")
    script["load_tokenizer"](script["ScriptArguments"](tokenizer_name_or_path=folder), ModelConfig())


def of_dry_run(folder, recipe, tmp_path):
    recipe("dry_run")["find_config"](folder)


LOADERS = {
    "policy": lambda folder, *rest: of_trainer(folder, *rest, model=folder),
    "expert": lambda folder, *rest: of_trainer(folder, *rest, expert_model=folder),
    "evaluated model": partial(of_evaluation, what="load_model"),
    "evaluated tokenizer": partial(of_evaluation, what="load_tokenizer"),
    "collected expert": of_collection,
    "tokenizer of a recipe": of_recipe,
    "config of a dry run": of_dry_run,
}


@pytest.mark.parametrize("loader", LOADERS)
def test_code_of_a_stranger_does_not_run(stranger, recipe, tmp_path, loader):
    folder, mark = stranger
    with pytest.raises((ValueError, OSError)):
        LOADERS[loader](folder, recipe, tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("role", ["model", "expert_model"])
def test_code_that_was_asked_for_runs(stranger, tmp_path, role):
    folder, mark = stranger
    with pytest.raises(ValueError, match="it ran"):
        make_trainer(tmp_path / "out", trust_remote_code=True, **{role: folder})
    assert mark.exists()


def calls(path: Path):
    """Calls of a file: the dotted name of what is called, and the call."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if not {"quickstart", "study"} & set(path.parts)], ids=relative
)
def test_whoever_loads_says_whose_code_may_run(path):
    """Else Transformers asks on the terminal. The quickstart and the study load what they have made themselves."""
    silent = [
        node.lineno
        for name, node in calls(path)
        if name.startswith("Auto") and name.endswith(".from_pretrained")
        if not {"trust_remote_code", None} & {keyword.arg for keyword in node.keywords}
    ]
    assert not silent, f"{relative(path)}, lines {silent}: pass trust_remote_code"


# ---- Pickles ------------------------------------------------------------------------------------------------------------------------------


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def as_pickle(folder: Path, name: str, mark: Path) -> str:
    """The folder with a pickle that bites in place of its weights."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    torch.save({"weight": Bomb(mark)}, folder / name)
    return str(folder)


def saved(folder: Path) -> Path:
    for part in (AutoModelForCausalLM, AutoTokenizer):
        part.from_pretrained(EXPERT).save_pretrained(folder)
    return folder


def test_the_bomb_works(tmp_path):
    torch.save(Bomb(tmp_path / "mark"), tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("role", ["expert_model", "model"])
@pytest.mark.parametrize("init_kwargs", [None, {"use_safetensors": False}], ids=["by_default", "if_asked_for"])
def test_weights_that_are_a_pickle_run_nothing(tmp_path, role, init_kwargs):
    """An expert's are not read at all by default; where Transformers reads them, it takes tensors alone."""
    folder = as_pickle(saved(tmp_path / "old"), "pytorch_model.bin", tmp_path / "mark")
    kwargs = {"expert_model_init_kwargs" if role == "expert_model" else "model_init_kwargs": init_kwargs}
    with pytest.raises((ValueError, OSError, pickle.UnpicklingError)) as caught:
        make_trainer(tmp_path / "out", **{role: folder}, **kwargs)
    assert ("its weights in safetensors" in str(caught.value)) == (role == "expert_model" and init_kwargs is None)
    assert not (tmp_path / "mark").exists()


def test_an_old_expert_is_read_if_asked_for(tmp_path):
    folder = saved(tmp_path / "old")
    weights = AutoModelForCausalLM.from_pretrained(EXPERT).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    trainer = make_trainer(
        tmp_path / "out", expert_model=str(folder), expert_model_init_kwargs={"use_safetensors": False}
    )
    assert all(torch.equal(value, weights[name]) for name, value in trainer.expert_model.state_dict().items())


def test_an_adapter_that_is_a_pickle_runs_nothing(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(POLICY), lora).save_pretrained(tmp_path / "adapter")
    folder = as_pickle(tmp_path / "adapter", "adapter_model.bin", tmp_path / "mark")
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        make_trainer(tmp_path, expert_model=folder, expert_model_shares_base=True, init={"peft_config": lora})
    assert not (tmp_path / "mark").exists()


def test_what_is_evaluated_is_no_pickle(tmp_path, recipe):
    folder = as_pickle(saved(tmp_path / "old"), "pytorch_model.bin", tmp_path / "mark")
    with pytest.raises(
        ValueError, match=r"expected a model with weights in safetensors, got .*save_pretrained\(new\)"
    ):
        of_evaluation(folder, recipe, tmp_path, "load_model")
    assert not (tmp_path / "mark").exists()


DANGEROUS = {"eval", "exec", "torch.load", "pickle.load", "pickle.loads", "joblib.load", "yaml.load", "os.system", "marshal.loads"}  # fmt: skip
ALLOWED = {("trl_selective/grading_pool.py", "pickle.load")}  # a child reads what its parent sends through a pipe


def test_nothing_of_ours_runs_data():
    found = {(relative(path), name) for path in SOURCES for name, node in calls(path) if name in DANGEROUS}
    found |= {
        (relative(path), f"{name}({keyword.arg}=True)")
        for path in SOURCES
        for name, node in calls(path)
        for keyword in node.keywords
        if keyword.arg in ("shell", "allow_pickle") and ast.unparse(keyword.value) == "True"
    }
    assert found == ALLOWED


# ---- Keys ---------------------------------------------------------------------------------------------------------------------------------

KEYS = {
    "hub_token": "hf_secret-1",
    "model_init_kwargs": {"token": "hf_secret-2", "dtype": "float32"},
    "expert_model_init_kwargs": {"token": "hf_secret-3", "dtype": "float32"},
}


@pytest.mark.parametrize("shown", [str, repr, lambda args: json.dumps(args.to_dict(), default=str), lambda args: args.to_json_string(),
                                   lambda args: str(args.to_sanitized_dict()), lambda args: str(vars(pickle.loads(pickle.dumps(args))))])  # fmt: skip
def test_settings_are_shown_without_keys(shown):
    """Trackers get `to_dict` or `to_sanitized_dict`, logs the others."""
    args = SelectiveGuidanceGRPOConfig(
        "out", use_cpu=True, bf16=False, num_generations=8, num_guided_generations=2, **KEYS
    )
    text = shown(args)
    assert "secret" not in text
    assert "num_guided_generations" in text
    assert text.count("float32") == 2
    assert args.model_init_kwargs["token"] == "hf_secret-2"  # which loads the model


def test_a_preset_is_told_without_keys():
    args = SelectiveGuidanceGRPOConfig("out", use_cpu=True, bf16=False, num_generations=8, preset="mentor", **KEYS)
    assert "secret" not in args.preset_in_words()
    assert "float32" in args.preset_in_words()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("kind", ["guide", "writer"])
def test_a_redirect_is_not_followed_and_takes_no_key_along(monkeypatch, status, kind):
    """Two servers on this machine: the one that was named sends its clients to the other."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    seen = []
    with Endpoint(lambda: None) as elsewhere:
        elsewhere.trouble = lambda number, headers: seen.append(dict(headers)) or (200, {}, "{}")
        target = f"{elsewhere.url}/completions"
        with Endpoint(lambda: None, lambda number, headers: (status, {"Location": target}, "{}")) as named:
            if kind == "guide":
                expert = ExpertServer(named.url, "the-expert", vocab_size=45, eos_token_ids=[1], patience=0.5)
                with pytest.raises(ExpertServerError, match=f"It redirects to '{target}', which is not followed"):
                    expert.draw([[3]], [0], 1.0)
            else:
                client = endpoint_client(named.url, timeout=5, max_retries=0)
                source = EndpointSource(client, "the-expert", Sampling(max_completion_length=4))
                with pytest.raises(RuntimeError, match=f"It redirects to '{target}', which is not followed"):
                    next(source.complete(path_dataset(1)["prompt"], 0))
            assert named.requests
    assert not seen
    assert not elsewhere.requests
