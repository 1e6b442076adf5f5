"""What is EchoAtt's own: its losses, its two stages, its control, its door."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from preceptor import cli
from preceptor.data.sequences import Sequence, collate
from preceptor.engine.settings import Training
from preceptor.errors import UserError
from preceptor.evaluation.language import UNTAUGHT
from preceptor.knowledge import HiddenTargets
from preceptor.methods.echoatt.followers import block_ends
from preceptor.methods.echoatt.layer_teacher import LayerTargets, Original
from preceptor.methods.echoatt.observed import Observed
from preceptor.methods.echoatt.passages import Passages, read_passages
from preceptor.methods.echoatt.recipe import (
    Config,
    inner_distance,
    main,
    paper,
    stage_one_loss,
    stage_two_loss,
    start,
    teach,
)
from preceptor.methods.echoatt.reproduction import MemoisedLayers
from preceptor.methods.echoatt.similarity import Similarity
from preceptor.models.language_model import LanguageModel
from preceptor.models.loading import load
from preceptor.models.memory import memory_needed
from preceptor.models.shared_attention.model import share
from preceptor.models.student import make_student
from tests.drawings import look
from tests.small_llama import small_llama

TRAINING = Training(steps=10, batch_size=4, learning_rate=3e-3, schedule="constant")
FOLLOWERS = [2, 4, 5]


def teacher_of(tokenizer, layers=6):
    return LanguageModel(small_llama(0, layers, initializer_range=0.3), tokenizer).eval()


def student_of(teacher):
    return LanguageModel(share(teacher.causal, FOLLOWERS), teacher.tokenizer).train()


def pieces(count, length=12):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 400, (count, length), generator=generator).tolist()
    return [Sequence(tuple(row), (False,) + (True,) * (length - 1)) for row in ids]


@pytest.mark.parametrize("direction", ["student_first", "teacher_first"])
def test_stage_one_against_a_slow_loop(tokenizer, direction):
    teacher = teacher_of(tokenizer)
    student = student_of(teacher)
    config = Config(direction=direction, inner_weight=0.3, soft_weight=0.5, hard_weight=0.7)
    ends = block_ends(FOLLOWERS)
    assert ends == (2, 5)
    batch = collate(pieces(2, 7), 0)
    targets = Original(teacher, ends)(batch)
    loss = Observed(student, ends)(
        batch,
        lambda hidden, head, inner: stage_one_loss(hidden, head, inner, batch=batch, targets=targets, config=config),
    )
    with torch.no_grad():
        ours = student.causal(input_ids=batch.input_ids, output_hidden_states=True, use_cache=False)
        theirs = teacher.causal(input_ids=batch.input_ids, output_hidden_states=True, use_cache=False)
    total = {"L_I": 0.0, "L_S": 0.0, "L_H": 0.0}
    for row in range(2):
        for place in range(6):
            q, p = (told.logits[row, place].double().log_softmax(-1) for told in (ours, theirs))
            first, second = (q, p) if direction == "student_first" else (p, q)
            total["L_S"] += float((first.exp() * (first - second)).sum())
            total["L_H"] -= float(q[p.argmax()])
            for end in ends if place else ():  # the first token's states are outliers, and left out
                apart = ours.hidden_states[end + 1][row, place] - theirs.hidden_states[end + 1][row, place]
                total["L_I"] += float(apart.double().square().mean()) / len(ends)
    assert int(loss.count) == 12
    for name, value in total.items():
        assert float(loss.parts[name]) == pytest.approx(value, rel=1e-4)
    wanted = 0.3 * total["L_I"] + 0.5 * total["L_S"] + 0.7 * total["L_H"]
    assert loss.sum.item() == pytest.approx(wanted, rel=1e-4)


def test_without_followers_only_the_teachers_own_doubt_is_left(tokenizer):
    teacher = teacher_of(tokenizer)
    student = LanguageModel(share(teacher.causal, []), tokenizer)
    batch = collate(pieces(2), 0)
    targets = Original(teacher, (1, 5))(batch)
    loss = Observed(student, (1, 5))(
        batch,
        lambda hidden, head, inner: stage_one_loss(hidden, head, inner, batch=batch, targets=targets, config=Config()),
    )
    assert float(loss.parts["L_I"]) == pytest.approx(0, abs=1e-8)
    assert float(loss.parts["L_S"]) == pytest.approx(0, abs=1e-4)
    assert float(loss.parts["L_H"]) > 0


def test_stage_two_is_the_cross_entropy_to_the_text(tokenizer):
    student = student_of(teacher_of(tokenizer))
    batch = collate(pieces(2), 0)
    loss = Observed(student, ())(batch, lambda hidden, head, inner: stage_two_loss(hidden, head, inner, batch=batch))
    wanted = student.causal(input_ids=batch.input_ids, labels=batch.input_ids, use_cache=False).loss
    assert loss.sum.item() / int(loss.count) == pytest.approx(wanted.item(), rel=1e-5)


def test_the_inner_distance_is_a_mean_over_elements_and_groups():
    ours = [torch.zeros(1, 3, 2), torch.zeros(1, 3, 2)]
    theirs = [
        torch.tensor([[[1.0, 1.0], [2.0, 0.0], [9.0, 9.0]]]),
        torch.tensor([[[0.0, 0.0], [2.0, 2.0], [9.0, 9.0]]]),
    ]
    tokens = torch.tensor([[True, True, False]])
    assert float(inner_distance(ours, theirs, tokens)) == pytest.approx((1 + 2 + 0 + 4) / 2)
    assert float(inner_distance([], [], tokens)) == 0


def test_the_teacher_is_asked_in_the_first_stage_only_and_never_changed(tokenizer, tmp_path):
    teacher, ends = teacher_of(tokenizer), block_ends(FOLLOWERS)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student, asked, targets = student_of(teacher), [], Original(teacher, ends)

    def counted(batch) -> LayerTargets:
        asked.append(len(batch))
        return targets(batch)

    config = Config(continued=0.3, training=replace(TRAINING, steps=30), output=str(tmp_path / "run"))
    teach(start(config, student, ends, teacher), counted, pieces(8), pieces(4), 0, config)
    assert len(asked) == 21
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["L_I" in line for line in lines] == [True] * 21 + [False] * 9
    first, last = ([line["loss"] for line in part] for part in (lines[:4], lines[17:21]))
    assert sum(last) < sum(first)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_stopped_run_ends_as_one_that_was_not(tokenizer, tmp_path):
    teacher, ends = teacher_of(tokenizer), block_ends(FOLLOWERS)

    def train(name, steps, resume=False):
        config = Config(training=replace(TRAINING, steps=10, save_every=3), output=str(tmp_path / name), resume=resume)
        student, targets = student_of(teacher), Original(teacher, ends)
        run, answered = start(config, student, ends, teacher), []

        def limited(batch):
            answered.append(batch)
            if len(answered) > steps:
                raise KeyboardInterrupt
            return targets(batch)

        teach(run, limited, pieces(16), pieces(4), 0, config)
        return student

    whole = train("whole", 99)
    with pytest.raises(KeyboardInterrupt):
        train("stopped", 4)
    again = train("stopped", 99, resume=True)
    for (name, one), other in zip(whole.named_parameters(), again.parameters()):
        assert torch.equal(one, other), name


def test_a_memory_says_what_the_teacher_says(tokenizer):
    teacher, texts = teacher_of(tokenizer), pieces(6)
    memory = MemoisedLayers(teacher, texts, (1, 2, 5))
    batch = collate([texts[4], texts[1]], 0)
    targets, wanted = memory.of((2, 5))(batch), Original(teacher, (2, 5))(batch)
    assert isinstance(targets.soft, HiddenTargets)
    torch.testing.assert_close(targets.soft.hidden, wanted.soft.hidden)
    assert torch.equal(targets.likeliest, wanted.likeliest)
    assert all((targets.likeliest[:, -1] == -100).tolist())
    for mine, other in zip(targets.inner, wanted.inner):
        torch.testing.assert_close(mine, other)


def test_the_student_on_disk_says_how_to_load_it(tokenizer, tmp_path):
    student = student_of(teacher_of(tokenizer)).eval()
    student.save(tmp_path / "student", card={"teacher": "a", "followers": "2, 4, 5"})
    assert "import preceptor" in (tmp_path / "student" / "README.md").read_text()
    batch = collate(pieces(2), 0)
    again = load(str(tmp_path / "student"))
    torch.testing.assert_close(again(batch), student(batch))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").config.followers == FOLLOWERS


def test_any_recipe_for_language_models_can_teach_one(tokenizer):
    teacher = teacher_of(tokenizer)
    student = make_student("teacher:followers=2,4,5", teacher, seed=0)
    assert student.causal.config.followers == FOLLOWERS
    adapted = make_student("lora:rank=2", student, seed=0)
    learning = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert any("layers.2.self_attn.v_proj" in name for name in learning)
    assert not any("layers.2.self_attn.q_proj" in name for name in learning)
    batch = collate(pieces(2), 0)
    torch.testing.assert_close(adapted(batch), student(batch))
    adapted(batch).square().sum().backward()
    with pytest.raises(UserError, match="Layer 0 cannot follow"):
        make_student("teacher:followers=0", teacher, seed=0)


def test_the_doctor_counts_what_followers_lack():
    need = memory_needed("smollm2", "teacher:followers=4,5,6", batch=1, length=64)
    assert need.teacher - need.student == 3 * 442_368


@pytest.mark.slow
def test_pieces_of_text_have_one_length_and_the_exam_has_its_own(tokenizer):
    train, exam = read_passages(Passages(limit=40, length=32, held_out=5), tokenizer, seed=3)
    assert {len(piece.ids) for piece in [*train, *exam]} == {32}
    assert len(exam) == 5
    assert not set(train) & set(exam)
    again, same = read_passages(Passages(limit=40, length=32, held_out=5), tokenizer, seed=3)
    assert (list(again), same) == (list(train), exam)
    assert list(train[2:4]) == [train[2], train[3]]
    assert read_passages(Passages(limit=40, length=32, held_out=5), tokenizer, seed=4)[1] != exam
    with pytest.raises(UserError, match="pieces of 100000, and 5 are held out"):
        read_passages(Passages(limit=40, length=100_000, held_out=5), tokenizer, seed=3)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"inner_weight": -1.0}, "The weights of L_I, L_S and L_H"),
        ({"inner_weight": 0.0, "soft_weight": 0.0, "hard_weight": 0.0}, "The weights of L_I, L_S and L_H"),
        ({"continued": 1.5}, "continued is 1.5"),
        ({"calibration": 0}, "calibration is 0"),
        ({"training": replace(TRAINING, shard=True)}, "training.shard"),
    ],
)
def test_settings_that_make_no_loss_are_refused(settings, told):
    with pytest.raises(UserError, match=told):
        Config(**settings)


def test_followers_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, capsys):
    for followers, told in (("0,3", "Layer 0 cannot follow"), ("30", "out of range"), ("all", "which layers share")):
        folder = tmp_path / followers.replace(",", "-")
        code = cli.main(["run", "echoatt", "--tiny", "--followers", followers, "--output", str(folder)])
        assert code == 2
        assert told in capsys.readouterr().err
        assert not folder.exists()


def small_text(path):
    path.write_text("\n".join(json.dumps({"text": f"the cat {n} sat on the mat and looked. " * 20}) for n in range(8)))
    return str(path)


def small_run(tokenizer, tmp_path, **settings):
    teacher_of(tokenizer).save(tmp_path / "teacher")
    small = Config(
        teacher=str(tmp_path / "teacher"),
        text=Passages(source=small_text(tmp_path / "text.jsonl"), length=24, held_out=2),
        calibration=2,
        output=str(tmp_path / "run"),
        training=replace(TRAINING, steps=2, batch_size=2),
    )
    return replace(small, **settings)


@pytest.mark.parametrize("followers", ["similar=2", "gap=2", "blocks=3", "2,4"])
def test_followers_are_chosen_in_a_new_folder_by_this_teacher(tokenizer, tmp_path, followers):
    config = small_run(tokenizer, tmp_path, followers=followers)
    # What another try left there is not taken for this teacher's.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "similarity.json").write_text("left by another teacher")
    assert main(config) is not None
    taught = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert taught.config.followers
    found = Similarity.read(tmp_path / "run" / "similarity.json")
    assert (len(found.cosines), found.texts) == (6, 2)
    look(tmp_path / "run" / "pictures" / "similarity.png")


def test_a_student_in_which_nobody_shares_is_the_teacher(tokenizer, tmp_path):
    with pytest.warns(UserWarning, match="no layer shares"):
        table = main(small_run(tokenizer, tmp_path, followers="blocks=1"))
    assert table is not None
    assert table.rows["KL(teacher ‖ model)"][UNTAUGHT].mean == pytest.approx(0, abs=1e-5)


def test_a_student_starts_from_the_teachers_weights_and_not_from_rounded_ones(tokenizer, tmp_path):
    config = small_run(tokenizer, tmp_path, followers="2,4", training=replace(TRAINING, steps=1, learning_rate=1e-30))
    main(config)
    taught, exact = (load(str(tmp_path / name)).causal for name in ("run/student", "teacher"))
    assert torch.equal(taught.model.decoder.layers[1].mlp.up_proj.weight, exact.model.layers[1].mlp.up_proj.weight)


def test_a_teacher_that_shares_already_is_refused_by_name(tokenizer, tmp_path):
    shared = student_of(teacher_of(tokenizer)).eval()
    shared.save(tmp_path / "shared")
    with pytest.raises(UserError, match="preceptor_shared_attention"):
        main(small_run(tokenizer, tmp_path, teacher=str(tmp_path / "shared"), followers="2"))
    for spec in ("teacher:layers=3", "fresh:layers=2,hidden=16"):
        with pytest.raises(UserError, match="do not stand alone"):
            make_student(spec, shared, seed=0)


def test_the_papers_setting_starts_at_tiny_width(tokenizer, tmp_path):
    teacher = teacher_of(tokenizer, layers=22)
    teacher.save(tmp_path / "teacher")
    config = replace(
        paper,
        teacher=str(tmp_path / "teacher"),
        text=replace(paper.text, source=small_text(tmp_path / "text.jsonl"), length=24, held_out=2),
        output=str(tmp_path / "run"),
        training=replace(paper.training, steps=2, batch_size=4, accumulate=2),
    )
    assert main(config) is not None
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert len(student.config.followers) == 17
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
