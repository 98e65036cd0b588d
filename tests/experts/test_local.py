"""An expert is loaded frozen, and refused where its token ids mean something else."""

import warnings

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models import tiny_adapter, tiny_model
from tests.training import EXPERT, POLICY
from trl_selective.experts import (
    accelerator_or_cpu,
    check_expert,
    check_readable,
    load_expert,
    load_expert_tokenizer,
    local,
    on_device,
)

CPU = torch.device("cpu")
WORDS = ["<pad>", "<eos>", "a", "b", "c"]


def tokenizer_of(words: list[str], eos: str | None = "<eos>") -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=words[0], eos_token=eos)


def expert_ending_with(ids):
    expert = tiny_model(1)
    expert.generation_config.eos_token_id = ids
    return expert


@pytest.mark.parametrize(("is_available", "expected"), [(False, CPU), (True, torch.device("cuda"))])
def test_a_build_for_accelerators_on_a_machine_without(monkeypatch, is_available, expected):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: is_available)
    assert accelerator_or_cpu() == expected


def assert_frozen(expert):
    assert not expert.training
    assert not any(parameter.requires_grad for parameter in expert.parameters())


@pytest.mark.parametrize(
    ("init_kwargs", "dtype"),
    [
        (None, torch.float32),
        ({}, torch.float32),
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"torch_dtype": torch.bfloat16}, torch.bfloat16),  # the older name
    ],
)
def test_from_a_folder(tmp_path, init_kwargs, dtype):
    saved = tiny_model(1).bfloat16()
    saved.save_pretrained(tmp_path)
    expert = load_expert(str(tmp_path), CPU, init_kwargs=init_kwargs)
    assert_frozen(expert)
    assert expert.dtype == dtype
    assert expert.device == CPU
    for name, weight in saved.state_dict().items():
        assert torch.equal(expert.state_dict()[name], weight.to(dtype))


def test_init_kwargs_reach_the_model(tmp_path):
    tiny_model(1).save_pretrained(tmp_path)
    expert = load_expert(str(tmp_path), CPU, init_kwargs={"attn_implementation": "eager"})
    assert expert.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("init_kwargs", "trust"),
    [(None, True), ({"trust_remote_code": False}, False)],
    ids=["by_default", "unless_said_otherwise"],
)
def test_revision_and_trust_reach_the_loader(monkeypatch, init_kwargs, trust):
    calls = []

    def from_pretrained(name, **kwargs):
        calls.append((name, kwargs["revision"], kwargs["trust_remote_code"]))
        return tiny_model(1)

    monkeypatch.setattr(local.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    load_expert("some/expert", CPU, revision="v2", init_kwargs=init_kwargs, trust_remote_code=True)
    assert calls == [("some/expert", "v2", trust)]


def test_a_model_is_frozen_in_place_and_keeps_its_dtype():
    model = tiny_model(1).bfloat16().train()
    expert = load_expert(model, CPU)
    assert expert is model
    assert expert.dtype == torch.bfloat16
    assert_frozen(expert)


def test_an_adapter_is_frozen_with_its_base():
    expert = load_expert(tiny_adapter(1).train(), CPU)
    assert_frozen(expert)
    expert.base_model.model.generation_config.eos_token_id = 1
    assert check_expert(expert, tokenizer_of(WORDS), tokenizer_of(WORDS), {1}) == 5


def test_a_model_moves_to_the_device_unless_it_was_placed():
    assert load_expert(tiny_model(1), torch.device("meta")).device.type == "meta"
    placed = tiny_model(1)
    placed.hf_device_map = {"": "cpu"}
    assert load_expert(placed, torch.device("meta")).device == CPU
    quantised = tiny_model(1)
    quantised.quantization_method = "bitsandbytes"
    assert load_expert(quantised, torch.device("meta")).device == CPU


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"init_kwargs": {"dtype": "bfloat16"}},
            r"expert_model_revision=None and expert_model_init_kwargs=\{'dtype': 'bfloat16'\}",
        ),
        ({"revision": "main"}, r"expert_model_revision='main' and expert_model_init_kwargs=None"),
    ],
)
def test_how_to_load_a_model_that_is_loaded(kwargs, message):
    with pytest.raises(ValueError, match=rf"expert_model is a LlamaForCausalLM, but {message} say how to load one"):
        load_expert(tiny_model(1), CPU, **kwargs)


def test_the_tokenizer_beside_the_weights():
    expert = load_expert(EXPERT, CPU)
    tokenizer = load_expert_tokenizer(expert)
    policy_tokenizer = load_expert_tokenizer(load_expert(POLICY, CPU))
    assert tokenizer.get_vocab() == policy_tokenizer.get_vocab()
    assert check_expert(expert, tokenizer, policy_tokenizer, {1}) == 45


def test_an_expert_built_in_memory_has_no_tokenizer():
    with pytest.warns(UserWarning, match="The expert was built in memory.*Pass `expert_processing_class`"):
        assert load_expert_tokenizer(tiny_model(1)) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_expert(expert_ending_with(1), None, tokenizer_of(WORDS), {1}) == 5


def test_one_vocabulary():
    assert check_expert(expert_ending_with(1), tokenizer_of(WORDS), tokenizer_of(WORDS), {1}) == 5


@pytest.mark.parametrize("padded", [3, 9, 200])
def test_heads_of_other_sizes_do_not_matter(padded):
    expert = tiny_model(1, vocab_size=padded)
    assert check_expert(expert, tokenizer_of(WORDS), tokenizer_of(WORDS), {1}) == 5


def test_tokens_behind_the_last_shared_id_are_not_shared():
    longer = tokenizer_of([*WORDS, "d", "e"])
    assert check_expert(expert_ending_with(1), longer, tokenizer_of(WORDS), {1}) == 5
    with pytest.warns(UserWarning, match=r"has no token 'd' \(id 5\) and 1 more"):
        assert check_expert(expert_ending_with(1), tokenizer_of(WORDS), longer, {1}) == 5
    other = tokenizer_of([*WORDS, "x", "y", "z"])
    with pytest.raises(ValueError, match="maps 'd' to None but the policy's maps it to 5"):
        check_expert(expert_ending_with(1), other, longer, {1})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["<pad>", "<eos>", "a", "c", "b"], "maps 'b' to 4 but the policy's maps it to 3"),
        (["<pad>", "<eos>", "a", "b", "x"], "maps 'c' to None but the policy's maps it to 4"),
        (["<eos>", "<pad>", "a", "b", "c"], "maps '<pad>' to 1 but the policy's maps it to 0"),
    ],
)
def test_a_token_with_two_ids_is_named(words, message):
    with pytest.raises(
        ValueError, match=f"The expert's tokenizer {message}.*choose an expert of the policy's model family"
    ):
        check_expert(expert_ending_with(1), tokenizer_of(words), tokenizer_of(WORDS), {0, 1})


@pytest.mark.parametrize(
    ("ends", "eos", "policy_ends"),
    [(1, "<eos>", {1}), ([1, 2], "<eos>", {1, 2, 3}), (None, "<eos>", {1}), (None, None, {3})],
)
def test_ends_that_the_policy_has_too(ends, eos, policy_ends):
    expert_tokenizer = tokenizer_of(WORDS, eos)
    assert check_expert(expert_ending_with(ends), expert_tokenizer, tokenizer_of(WORDS), policy_ends) == 5


@pytest.mark.parametrize(
    ("ends", "eos", "message"),
    [
        (2, "<eos>", r"ends its answers with \['a'\] \(ids \[2\]\), but the policy ends with ids \[1\] only"),
        ([1, 3, 2], "<eos>", r"ends its answers with \['a', 'b'\] \(ids \[2, 3\]\), .*whose `eos_token` is 'a'"),
        (1, "c", r"ends its answers with \['c'\] \(ids \[4\]\)"),
        (
            None,
            "c",
            r"ends its answers with \['c'\] \(ids \[4\]\), .* add the ids to its `generation_config.eos_token_id`",
        ),
    ],
)
def test_an_end_that_would_not_end_the_rollout_is_named(ends, eos, message):
    with pytest.raises(ValueError, match=f"The expert {message}"):
        check_expert(expert_ending_with(ends), tokenizer_of(WORDS, eos), tokenizer_of(WORDS), {1})


def test_an_expert_without_generation_config():
    expert = tiny_model(1)
    expert.generation_config = None
    assert check_expert(expert, tokenizer_of(WORDS), tokenizer_of(WORDS), {1}) == 5


def test_the_tokenizer_comes_from_where_the_weights_come_from(monkeypatch):
    calls = []
    monkeypatch.setattr(local.AutoTokenizer, "from_pretrained", lambda name, **kwargs: calls.append((name, kwargs)))
    expert = tiny_model(1)
    expert.config.name_or_path = "some/expert"
    init_kwargs = {"subfolder": "best", "dtype": "float32"}
    load_expert_tokenizer(expert, revision="v2", init_kwargs=init_kwargs, trust_remote_code=True)
    assert calls == [("some/expert", {"revision": "v2", "trust_remote_code": True, "subfolder": "best"})]


def test_a_missing_tokenizer_is_named(tmp_path):
    tiny_model(1).save_pretrained(tmp_path)
    expert = load_expert(tmp_path, CPU)  # a path as good as its text
    with pytest.raises(
        ValueError, match=r"No tokenizer could be loaded beside the expert .* pass `expert_processing_class`"
    ):
        load_expert_tokenizer(expert)


def test_a_missing_expert_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"The expert 'some/expert' could not be loaded. Expected a Hub id, a folder with a model"
    ):
        load_expert("some/expert", CPU)


# Offloading.


def test_an_offloaded_expert_is_in_main_memory_but_when_used(monkeypatch):
    expert = load_expert(tiny_model(1), torch.device("meta"), offload=True)  # "meta" in place of an accelerator
    assert_frozen(expert)
    assert expert.device == CPU
    moves = []
    monkeypatch.setattr(expert, "to", lambda device: moves.append(str(device)))
    with on_device(expert, torch.device("meta")):
        assert moves == ["meta"]
    assert moves == ["meta", "cpu"]
    with pytest.raises(KeyError), on_device(expert, torch.device("meta")):
        raise KeyError
    assert moves == ["meta", "cpu"] * 2


@pytest.mark.gpu
def test_an_offloaded_expert_takes_no_memory_of_the_accelerator():
    device = torch.device("cuda")
    before = torch.cuda.memory_allocated()
    expert = load_expert(tiny_model(1), device, offload=True)
    assert torch.cuda.memory_allocated() == before
    with on_device(expert, device):
        assert expert.device.type == "cuda"
        assert torch.cuda.memory_allocated() > before
    assert expert.device == CPU
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("reason", ["hf_device_map", "quantization_method"])
def test_an_expert_that_cannot_be_moved_cannot_be_offloaded(reason):
    expert = tiny_model(1)
    setattr(expert, reason, {"": "cpu"})
    with pytest.raises(ValueError, match=r"expert_model_offload=True needs .* device map or quantised weights"):
        load_expert(expert, CPU, offload=True)


BIGGER = [*WORDS, "<think>", "<answer>"]


def test_tokens_that_the_experts_tokenizer_lacks_are_named():
    expert = tiny_model(1, vocab_size=7)  # whose embeddings have room for them
    with pytest.warns(
        UserWarning,
        match=r"has no token '<think>' \(id 5\) and 1 more, as the policy's has: the expert never draws them",
    ):
        assert check_expert(expert, tokenizer_of(WORDS), tokenizer_of(BIGGER), [1]) == 5


def test_tokens_that_the_expert_cannot_read_are_refused():
    expert = tiny_model(1, vocab_size=6)
    message = r"reads token ids below 6, but the policy's tokenizer has token '<answer>' \(id 6\)\. .*resize_token_embeddings\(7\)"
    with pytest.raises(ValueError, match=message):
        check_readable(expert, tokenizer_of(BIGGER), head_size=7)
    check_readable(expert, tokenizer_of(BIGGER), head_size=6)  # the policy itself cannot use it


def test_a_new_token_that_only_pads_is_no_token():
    tokenizer = tokenizer_of(WORDS)
    tokenizer.add_special_tokens({"pad_token": "<new_pad>"})
    assert tokenizer.pad_token_id == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_expert(tiny_model(1, vocab_size=5), tokenizer_of(WORDS), tokenizer, [1]) == 5
        check_readable(tiny_model(1, vocab_size=5), tokenizer, head_size=6)
