"""evaluate_mmlu() against each prompt on its own, and the files and prompts of MMLU."""

import shutil
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    DistilBertConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

import lte
from byte_tokenizer import byte_tokenizer
from lte.evaluation.mmlu import Score, _next_token, _prefix, evaluate_mmlu
from lte.evaluation.mmlu_prompts import PromptEncoder
from lte.evaluation.mmlu_questions import CATEGORIES, CATEGORY_OF, Question, Subject, read_mmlu
from lte.surgery.loading import check_causal
from mmlu_folder import SUBJECTS, write_mmlu

torch.set_num_threads(1)
IDS = {"vocab_size": 258, "pad_token_id": 1, "eos_token_id": 0, "bos_token_id": None}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3, **IDS}
FFN = {"intermediate_size": 64, "max_position_embeddings": 1024}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, **FFN),
    "mistral": MistralConfig(**SHAPE, **FFN, num_key_value_heads=2, sliding_window=16),
    "gemma2": Gemma2Config(**SHAPE, **FFN, num_key_value_heads=2, head_dim=8, sliding_window=16),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_inner=64, initializer_range=0.3, **IDS),
    "opt": OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=1024),
    "bloom": BloomConfig(**IDS, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
    "phi": PhiConfig(**SHAPE, **FFN),
}


def model_of(family: str = "llama", sparse: bool = True, **changes):
    torch.manual_seed(0)
    config = CONFIGS[family].__class__.from_dict({**CONFIGS[family].to_dict(), **changes})
    model = AutoModelForCausalLM.from_config(config)
    if sparse:
        lte.sparsify_(model, lte.LTEConfig(expert_size=8, grouping="random"))
        lte.set_mode_(model, "hard")
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_mmlu(tmp_path_factory.mktemp("mmlu"))


@pytest.fixture(scope="module")
def subjects(folder) -> list[Subject]:
    return read_mmlu(folder)


def prompt_ids(subject: Subject, question: Question, shots: int) -> torch.Tensor:
    """By bytes, where the space before the letter is a token that all answers share."""
    return torch.tensor([byte_tokenizer()(subject.prompt(question, shots) + " ")["input_ids"]])


def letter_alone(model, ids: torch.Tensor) -> str:
    logits = model(input_ids=ids).logits[0, -1]
    return max("ABCD", key=lambda letter: logits[byte_tokenizer()(letter)["input_ids"][0]].item())


def test_a_prompt_by_hand():
    question = Question("Why?", ("a", "b", "c", "d"), "C")
    subject = Subject("high_school_physics", [replace(question, text="How?"), question], [question])
    header = "The following are multiple choice questions (with answers) about high school physics.\n\n"
    choices = "\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    assert subject.prompt(question, 0) == f"{header}Why?{choices}"
    assert subject.prompt(question, 1) == f"{header}How?{choices} C\n\nWhy?{choices}"
    assert subject.prompt(question, 2) == f"{header}How?{choices} C\n\nWhy?{choices} C\n\nWhy?{choices}"


def test_categories_are_those_of_the_release():
    assert {name: len(some) for name, some in CATEGORIES.items()} == {
        "STEM": 18,
        "humanities": 13,
        "social sciences": 12,
        "other": 14,
    }
    assert len(CATEGORY_OF) == 57


@pytest.mark.parametrize("family", CONFIGS)
def test_a_shared_prefix_and_padding_change_nothing(family):
    """The window of two of the families is shorter than the prefix."""
    model = model_of(family)
    generator = torch.Generator().manual_seed(1)
    prefix = torch.randint(2, 258, (40,), generator=generator)
    rows = [torch.randint(2, 258, (n,), generator=generator) for n in (23, 9, 9, 1)]
    expected = torch.stack([model(input_ids=torch.cat([prefix, row])[None]).logits[0, -1] for row in rows])
    with torch.no_grad():
        cache = _prefix(model, prefix)
        for _ in range(2):  # the first leaves the cache as it was
            torch.testing.assert_close(_next_token(model, rows, cache), expected, rtol=1e-4, atol=1e-5)
        whole = [torch.cat([prefix, row]) for row in rows]
        torch.testing.assert_close(_next_token(model, whole, None), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sparse", [True, False])
def test_each_question_is_answered_as_it_is_alone(subjects, sparse):
    model = model_of(sparse=sparse)
    alone = {s.name: "".join(letter_alone(model, prompt_ids(s, q, 5)) for q in s.questions) for s in subjects}
    assert len(set("".join(alone.values()))) > 1
    for batch_size in (1, 3, 8):
        found = evaluate_mmlu(model, subjects, byte_tokenizer(), batch_size=batch_size)
        assert found.predictions == alone
    assert (found.shots, found.fewer_shots, found.cut) == (5, 0, 0)
    assert found.num_tokens == sum(prompt_ids(s, q, 5).shape[1] for s in subjects for q in s.questions)
    assert found.mode == ("hard" if sparse else "dense")


def test_sparsity_is_that_of_every_prompt_on_its_own(subjects):
    """A shared prefix counts once a question, and padding not at all."""
    model = model_of()
    with lte.track_sparsity(model) as meter, torch.no_grad():
        for subject in subjects:
            for question in subject.questions:
                model(input_ids=prompt_ids(subject, question, 5))
    found = evaluate_mmlu(lte.optimize_(model), subjects, byte_tokenizer(), batch_size=4)
    assert found.sparsity == pytest.approx(meter.overall, abs=1e-5)
    assert found.layer_sparsity == pytest.approx(meter.by_layer, abs=1e-5)
    assert 0.1 < found.sparsity < 0.9
    assert found.gflops_per_token == lte.cost_per_token(model, found.layer_sparsity).gflops
    assert found.gflops_per_token_dense == lte.cost_per_token(model, 0.0).gflops


def test_a_dense_model_has_no_sparsity(subjects):
    found = evaluate_mmlu(model_of(sparse=False), subjects, byte_tokenizer(), shots=0)
    assert (found.sparsity, found.layer_sparsity, found.mode) == (0.0, [], "dense")
    assert found.gflops_per_token == found.gflops_per_token_dense


@torch.no_grad()
def test_accuracy_of_a_model_that_always_says_c(subjects):
    model = model_of("phi", sparse=False)
    model.lm_head.weight.zero_()
    model.lm_head.bias[byte_tokenizer()("C")["input_ids"][0]] = 1.0
    model.lm_head.bias[0] = 2.0  # what is no answer does not matter
    found = evaluate_mmlu(model, subjects, byte_tokenizer(), shots=1)
    assert found.predictions == {name: "C" * (6 + i) for i, name in enumerate(SUBJECTS)}
    # answers go ABCD from the first letter of the subject on: 6, 7, 8 and 9 of them
    assert found.by_subject == {
        "anatomy": Score(1 / 6, 6),
        "astronomy": Score(2 / 7, 7),
        "high_school_physics": Score(2 / 8, 8),
        "philosophy": Score(2 / 9, 9),
    }
    assert found.by_category == {"STEM": Score(4 / 15, 15), "humanities": Score(2 / 9, 9), "other": Score(1 / 6, 6)}
    assert (found.accuracy, found.num_questions) == (7 / 30, 30)
    assert found.subject_mean == pytest.approx((1 / 6 + 2 / 7 + 2 / 8 + 2 / 9) / 4)


def test_fewer_shots_where_the_model_has_no_room(subjects):
    lengths = sorted(prompt_ids(s, q, 3).shape[1] for s in subjects for q in s.questions)
    room = lengths[len(lengths) // 2]  # with 3 examples half of the prompts fit, with 2 all
    long = Question("Why" + " oh why" * 60, ("a", "b", "c", "d"), "A")
    given = [*subjects[:-1], replace(subjects[-1], questions=[*subjects[-1].questions, long])]
    model = model_of(max_position_embeddings=room)
    found = evaluate_mmlu(model, given, byte_tokenizer(), shots=3, batch_size=4)
    fewer = tokens = 0
    for subject in given:
        letters = ""
        for question in subject.questions:
            shots = next((k for k in (3, 2) if prompt_ids(subject, question, k).shape[1] <= room), 0)
            fewer += shots < 3
            ids = prompt_ids(subject, question, shots)[:, -room:]
            tokens += ids.shape[1]
            letters += letter_alone(model, ids)
        assert found.predictions[subject.name] == letters
    assert (found.fewer_shots, found.cut, found.num_tokens) == (fewer, 1, tokens)
    assert 0 < fewer < found.num_questions


def test_a_letter_with_its_space_is_one_token_where_the_tokenizer_has_it(subjects):
    merged = byte_tokenizer(bos_token="<pad>")
    vocabulary = merged.get_vocab() | {f"Ġ{letter}": 258 + i for i, letter in enumerate("ABCD")}
    merges = [("Ġ", letter) for letter in "ABCD"]
    merged.backend_tokenizer.model = models.BPE(vocab=vocabulary, merges=merges)
    parts = {"single": "<pad> $A", "special_tokens": [("<pad>", 1)]}
    merged.backend_tokenizer.post_processor = processors.TemplateProcessing(**parts)
    assert PromptEncoder(merged, 999).answers == [258, 259, 260, 261]
    assert PromptEncoder(byte_tokenizer(), 999).answers == [byte_tokenizer()(c)["input_ids"][0] for c in "ABCD"]
    for tokenizer, end in ((merged, ""), (byte_tokenizer(), " ")):
        (group,) = PromptEncoder(tokenizer, 999).groups(subjects[0], 2)
        assert len(group.prefix) > 100
        for row, place in zip(group.rows, group.places, strict=True):
            text = subjects[0].prompt(subjects[0].questions[place], 2) + end
            assert [*group.prefix.tolist(), *row.tolist()] == tokenizer(text)["input_ids"]


def test_a_tokenizer_that_does_not_tell_letters_apart():
    words = Tokenizer(models.WordLevel({"?": 0, "Answer": 1, ":": 2, "a": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match='does not tell " A"'):
        PromptEncoder(PreTrainedTokenizerFast(tokenizer_object=words), 999)


def test_only_what_is_asked_for_is_read(folder):
    (found,) = read_mmlu(folder, subjects=("philosophy", "philosophy"), max_questions=2)
    assert (found.name, len(found.examples), len(found.questions)) == ("philosophy", 5, 2)
    assert found.questions[1] == Question("What is very very very 31?", ("31", "none, or one", '"a"', "x"), "A")
    assert [subject.name for subject in read_mmlu(folder)] == list(SUBJECTS)


def test_without_examples_there_need_be_no_dev(tmp_path):
    shutil.rmtree(write_mmlu(tmp_path) / "dev")
    assert all(subject.examples == [] and subject.questions for subject in read_mmlu(tmp_path, examples=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subjects": ["anatomie"]}, "no subject 'anatomie': do you mean anatomy"),
        ({"subjects": ["42"]}, "no subject '42': its names are"),
        ({"subjects": ["virology"]}, r"has no dev/virology_dev\.csv"),
        ({"split": "val"}, r"has no val/\*_val\.csv"),
    ],
)
def test_what_a_folder_does_not_have(folder, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_mmlu(folder, **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a,b,c,d,A\n", "row 1: 5 columns"),
        ("q,a,b,c,d,A\nq,a,b,c,d,E\n", "row 2: the answer 'E'"),
        ("question,A,B,C,D,answer\n", "row 1: the answer 'answer'.*no header"),
        ('"q,a,b,c,d,A\nq,a,b,c,d,B\n', r"anatomy_test\.csv: unexpected end of data: it has to be CSV"),
        ("caf\xe9,a,b,c,d,A\n", r"anatomy_test\.csv: .*UTF-8"),
    ],
)
def test_files_that_are_not_as_released(tmp_path, text, message):
    write_mmlu(tmp_path)
    (tmp_path / "test" / "anatomy_test.csv").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        read_mmlu(tmp_path)


def test_what_is_refused(subjects):
    model, tokenizer = model_of(), byte_tokenizer()
    with pytest.raises(ValueError, match="shots is 6, but anatomy has 5 examples"):
        evaluate_mmlu(model, subjects, tokenizer, shots=6)
    with pytest.raises(ValueError, match="shots is -1"):
        evaluate_mmlu(model, subjects, tokenizer, shots=-1)
    with pytest.raises(ValueError, match="no question"):
        evaluate_mmlu(model, [], tokenizer)


def test_only_models_that_do_not_look_ahead():
    bert = BertForMaskedLM(BertConfig(**SHAPE, intermediate_size=64))
    lte.sparsify_(bert, lte.LTEConfig(expert_size=8, grouping="random"))
    for config in (bert.config, BertConfig(), DistilBertConfig(), T5Config()):
        with pytest.raises(ValueError, match="causal language model, not a"):
            check_causal(config, "MMLU asks")
    for config in (BertConfig(is_decoder=True), GPTNeoXConfig(), model_of().config):
        check_causal(config, "MMLU asks")


def test_the_model_is_left_as_it_was(subjects):
    model = model_of().train()
    evaluate_mmlu(model, subjects[:1], byte_tokenizer(), shots=1)
    assert model.training
    assert all(not layer.kept_in for layer in model.modules() if hasattr(layer, "kept_in"))
