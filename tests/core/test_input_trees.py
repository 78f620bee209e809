"""Inputs of several tensors, in mappings, tuples and lists: the same as one tensor of all of them."""

import itertools
from collections import UserDict, namedtuple
from typing import Any

import pytest
import thinning
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradmix
from gradmix import GradMix, ReplayBuffer, alignment_matrix, mixed_forward, reference_gradient, select_pairs
from gradmix.model.inputs import map_tensors

CLASSES, IMAGE, TABLE, LAM = 4, 5, 3, 0.4
Named = namedtuple("Named", ["image", "table"])


class Parts(nn.Module):
    """A network of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image, self.table, self.fc = nn.Linear(IMAGE, 6), nn.Linear(TABLE, 6), nn.Linear(6, CLASSES)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        self.double()

    def features(self, image: Tensor, table: Tensor) -> Tensor:
        return torch.tanh(self.image(image) + self.table(table))

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        return self.fc(self.features(image, table))


class Joined(Parts):
    """The same network of one tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :IMAGE], x[:, IMAGE:])


class OfMapping(Parts):
    """The same network of a mapping as it is."""

    def forward(self, batch: Any) -> Tensor:
        return super().forward(**batch)


class OfNested(Parts):
    """The same network of a mapping with a list in it."""

    def forward(self, both: Any) -> Tensor:
        return super().forward(both["in"][0], both["in"][1]["table"])


class OfList(Parts):
    """The same network of a list as it is."""

    def forward(self, both: Any) -> Tensor:
        return super().forward(*both)


FORMS: dict[str, tuple[type[Parts], Any]] = {
    "mapping by keyword": (Parts, lambda image, table: {"image": image, "table": table}),
    "mapping in another order": (Parts, lambda image, table: {"table": table, "image": image}),
    "mapping of another class": (Parts, lambda image, table: UserDict(image=image, table=table)),
    "mapping as it is": (OfMapping, lambda image, table: {"image": image, "table": table}),
    "tuple": (Parts, lambda image, table: (image, table)),
    "named tuple": (Parts, Named),
    "list": (Parts, lambda image, table: [image, table]),
    "list as it is": (OfList, lambda image, table: [image, table]),
    "nested": (OfNested, lambda image, table: {"in": [image, {"table": table}]}),
}


def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, IMAGE + TABLE, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (n,), generator=generator)


def formed(form: Any, pair: tuple[Tensor, Tensor]) -> tuple[Any, Tensor]:
    return form(pair[0][:, :IMAGE], pair[0][:, IMAGE:]), pair[1]


def joined(x: Any) -> Tensor:
    """The tensor that a tree of any form is made of."""
    if isinstance(x, Tensor):
        return x
    found: dict[int, Tensor] = {}
    map_tensors(lambda leaf: found.setdefault(leaf.shape[1], leaf), x)
    return torch.cat([found[IMAGE], found[TABLE]], 1)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def assert_same(pairs: gradmix.Pairs, expected: gradmix.Pairs) -> None:
    assert torch.equal(pairs.partner, expected.partner) and torch.equal(pairs.lam, expected.lam)
    torch.testing.assert_close(pairs.alignment, expected.alignment, equal_nan=True)
    (x, y), (own, labels) = pairs.mix(), expected.mix()
    torch.testing.assert_close(joined(x), joined(own))
    torch.testing.assert_close(y, labels)
    assert torch.equal(joined(pairs.other_x()), joined(expected.other_x()))
    torch.testing.assert_close(joined(pairs.as_tuple()[0]), joined(expected.as_tuple()[0]))
    torch.testing.assert_close(pairs.mix_labels(), labels)


@pytest.mark.parametrize("form", FORMS)
def test_cosines_are_those_of_a_loop_over_pairs(form: str) -> None:
    kind, tree = FORMS[form]
    model, (x, y), kept = kind(), rows(6, 1), rows(9, 2)
    h = [model.features(v[:, :IMAGE], v[:, IMAGE:]).detach() for v in (x, kept[0])]
    weights = list(model.fc.parameters())

    def gradient(features: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(model.fc(features), labels)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])

    reference = gradient(h[1], kept[1])
    hot = F.one_hot(y, CLASSES).double()
    truth = torch.stack(
        [
            torch.stack(
                [
                    F.cosine_similarity(
                        gradient(
                            (LAM * h[0][i] + (1 - LAM) * h[0][j])[None], (LAM * hot[i] + (1 - LAM) * hot[j])[None]
                        ),
                        reference,
                        0,
                    )
                    for j in range(6)
                ]
            )
            for i in range(6)
        ]
    )
    pairs = select_pairs(model, formed(tree, kept), formed(tree, (x, y)), lam=LAM, chunk_size=4)
    off = ~torch.eye(6, dtype=torch.bool)
    torch.testing.assert_close(pairs.alignment[off], truth[off])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("criterion", ["sample", "class"])
@pytest.mark.parametrize("estimator", ["feature", "mixed"])
def test_every_estimator_chooses_as_with_one_tensor(estimator: str, criterion: str, form: str) -> None:
    check_against_one_tensor(estimator, criterion, form, ("uniform", "permute", "best"))


@pytest.mark.parametrize("form", ["mapping by keyword", "mapping as it is", "tuple", "nested"])
@pytest.mark.parametrize("criterion", ["sample", "class"])
@pytest.mark.parametrize("estimator", ["jvp", "sketch"])
def test_estimators_over_all_parameters_choose_as_with_one_tensor(estimator: str, criterion: str, form: str) -> None:
    check_against_one_tensor(estimator, criterion, form, ("uniform", "permute"))


def check_against_one_tensor(estimator: str, criterion: str, form: str, policies: tuple[str, ...]) -> None:
    kind, tree = FORMS[form]
    batch, buffer, candidates = rows(7, 1), rows(11, 2), rows(5, 3)
    how: dict[str, Any] = {"estimator": estimator, "criterion": criterion}
    got, expected = (
        (model, *(shape(pair) for pair in (batch, buffer, candidates)))
        for model, shape in ((kind(), lambda pair: formed(tree, pair)), (Joined(), lambda pair: pair))
    )
    additions: list[dict[str, Any]] = [{}, {"candidates": 3}, {"buffer": batch[1] == batch[1][0]}]
    combinations = [(more, policy) for more in additions for policy in policies]
    if not thinning.ALL:  # a policy does not see what form the inputs have
        combinations = list(zip(additions, itertools.cycle(policies), strict=False))
    for more, policy in combinations:

        def select(given: Any, more: dict[str, Any] = more, policy: str = policy) -> gradmix.Pairs:
            model, own, kept, others = given
            foreign = {"candidates": others} if "candidates" in more else {}
            source = more.get("buffer", kept)
            return select_pairs(
                model, source, own, lam=LAM, policy=policy, generator=generator(), chunk_size=4, **foreign, **how
            )

        assert_same(select(got), select(expected))

    def step(given: Any) -> tuple[gradmix.Pairs, gradmix.Pairs]:
        model, own, kept, others = given
        mixup = GradMix(model, kept, generator=generator(), refresh=2, **how)
        return mixup.select(*own), mixup.select(*own, candidates=others)

    for one, other in zip(step(got), step(expected), strict=True):
        assert_same(one, other)
    a, b = (alignment_matrix(model, kept, own, lam=LAM, **how) for model, own, kept, _ in (got, expected))
    torch.testing.assert_close(a.inner, b.inner, equal_nan=True)


@pytest.mark.parametrize("form", FORMS)
def test_reference_gradients_are_those_of_one_tensor(form: str) -> None:
    kind, tree = FORMS[form]
    buffer = rows(11, 2)
    expected = reference_gradient(Joined(), buffer)
    torch.testing.assert_close(reference_gradient(kind(), formed(tree, buffer), chunk_size=3), expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_call_mixes_a_tree(form: str) -> None:
    kind, tree = FORMS[form]
    batch, buffer = rows(7, 1), rows(11, 2)
    x, y = GradMix(kind(), formed(tree, buffer), generator=generator())(*formed(tree, batch))
    own, labels = GradMix(Joined(), buffer, generator=generator())(*batch)
    torch.testing.assert_close(joined(x), own)
    torch.testing.assert_close(y, labels)


# ------------------------------------------------------------------------------------------ parts that cannot be mixed


class Text(nn.Module):
    """Token ids with a mask of a floating-point dtype, as some tokenizers' collators make it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.fc = nn.Embedding(20, 6), nn.Linear(6, CLASSES)
        self.double()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.fc((self.words(ids) * mask[..., None]).mean(1))


def texts(n: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids, y = torch.randint(20, (n, 4), generator=generator), torch.randint(CLASSES, (n,), generator=generator)
    return {"ids": ids, "mask": torch.ones(n, 4, dtype=dtype)}, y


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_labels_are_not_mixed_where_inputs_are_not(dtype: torch.dtype) -> None:
    model, (x, y) = Text(), texts(6, 1, dtype)
    pairs = select_pairs(model, texts(9, 2, dtype), (x, y), threshold=-1.0, lam=LAM)
    assert pairs.helpful.all()
    for mix in (pairs.mix, pairs.as_tuple):
        with pytest.raises(TypeError, match=r"x(\['ids'\])?: got dtype torch.int64.*pairs\.mix_labels\(\)"):
            mix()
    with pytest.raises(TypeError, match=r"gradmix.mixed_forward\(model, stage, x, pairs.other_x\(\), pairs.lam\)"):
        GradMix(model, texts(9, 2, dtype), threshold=-1.0)(x, y)
    # What the error says to do:
    logits = mixed_forward(model, "words", x, pairs.other_x(), pairs.lam)
    embedded = model.words(x["ids"]), model.words(x["ids"])[pairs.partner]
    mixed = LAM * embedded[0] + (1 - LAM) * embedded[1]
    torch.testing.assert_close(logits, model.fc((mixed * x["mask"][..., None]).mean(1)))
    assert pairs.mix_labels().shape == (6, CLASSES)


@pytest.mark.parametrize("criterion", ["sample", "class"])
def test_the_estimator_that_mixes_inputs_says_so_too(criterion: str) -> None:
    how: dict[str, Any] = {"estimator": "mixed", "criterion": criterion}
    with pytest.raises(TypeError, match=r"x\['ids'\]: got dtype torch.int64 and other values for a sample"):
        select_pairs(Text(), texts(9, 2), texts(6, 1), **how)
    with pytest.raises(TypeError, match=r"x\['ids'\]: got dtype torch.int64 and other values for a sample"):
        GradMix(Text(), texts(9, 2), **how).select(*texts(6, 1))
    with pytest.raises(TypeError, match="batch: got x of dtype torch.int64 with the estimator 'mixed'"):
        select_pairs(Text(), texts(9, 2, torch.int64), texts(6, 1, torch.int64), **how)


def test_parts_that_all_rows_share_stay() -> None:
    x, y = texts(6, 1)
    x = {"ids": x["ids"][:1].expand(6, -1), "mask": torch.rand(6, 4, dtype=torch.float64)}
    pairs = select_pairs(Text(), texts(9, 2), (x, y), threshold=-1.0, lam=LAM)
    mixed, _ = pairs.mix()
    assert torch.equal(mixed["ids"], x["ids"])
    torch.testing.assert_close(mixed["mask"], LAM * x["mask"] + (1 - LAM) * x["mask"][pairs.partner])


def test_a_row_that_stays_unmixed_keeps_its_parts() -> None:
    x, y = texts(6, 1)
    pairs = select_pairs(Text(), texts(9, 2), (x, y), candidates=texts(3, 4), threshold=1.0)
    assert not pairs.helpful.any()
    mixed, _ = pairs.mix()
    assert all(torch.equal(mixed[key], x[key]) for key in x)


def test_bad_trees_are_named() -> None:
    model, buffer, (x, y) = Text(), texts(9, 2), texts(6, 1)
    hurt = x["mask"].clone()
    hurt[3, 1] = torch.nan
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"batch": (x | {"mask": hurt}, y)}, ValueError, r"batch\['mask'\]: sample 3 holds NaN"),
        ({"batch": (x | {"mask": hurt[:2]}, y)}, ValueError, r"batch x\['mask'\]: got 2 samples, expected 6"),
        ({"batch": (x | {"mask": [1.0]}, y)}, TypeError, r"batch x\['mask'\]\[0\]: got float, expected a tensor"),
        ({"batch": ({}, y)}, ValueError, "batch x: got dict without tensors"),
        (
            {"candidates": ({"ids": x["ids"]}, y)},
            ValueError,
            r"candidates: got the parts candidates\['ids'\], expected",
        ),
        (
            {"candidates": (x | {"mask": torch.ones(6, 5)}, y)},
            ValueError,
            r"candidates\['mask'\]: got samples of shape \(5,\), expected \(4,\) as the batch",
        ),
        (
            {"candidates": (x | {"mask": torch.ones(6, 4, dtype=torch.int64)}, y)},
            TypeError,
            r"candidates\['mask'\]: got x of dtype torch.int64, expected torch.float64 as the batch",
        ),
    ]
    for change, error, message in cases:
        given = {"model": model, "buffer": buffer, "batch": (x, y)} | change
        with pytest.raises(error, match=message):
            select_pairs(given.pop("model"), given.pop("buffer"), given.pop("batch"), **given)
    pairs = select_pairs(model, buffer, (x, y))
    with pytest.raises(ValueError, match="x: got 4 samples, expected the 6"):
        pairs.mix(texts(4, 1)[0])
    with pytest.raises(ValueError, match=r"other_x: got 3 samples, expected 6"):
        mixed_forward(model, "words", x, texts(3, 1)[0], 0.5)


# --------------------------------------------------------------------------------------------------- mixing at a stage


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "data-parallel"])
def test_mixing_at_a_stage_takes_trees(form: str, wrapped: bool) -> None:
    kind, tree = FORMS[form]
    model, (x, _), (others, _) = kind(), rows(6, 1), rows(6, 2)
    lam = torch.rand(6, generator=generator(), dtype=torch.float64)
    own, other = (model.features(v[:, :IMAGE], v[:, IMAGE:]) for v in (x, others))
    expected = model.fc(lam[:, None] * own + (1 - lam)[:, None] * other)
    called = nn.DataParallel(model) if wrapped else model
    forms = formed(tree, (x, lam))[0], formed(tree, (others, lam))[0]
    torch.testing.assert_close(mixed_forward(called, "feature", *forms, lam, head="fc"), expected)
    order = torch.randperm(6, generator=generator())
    partners = formed(tree, (others[order], lam))[0]
    got = mixed_forward(called, "fc", forms[0], partners, lam, partner=order.argsort())
    torch.testing.assert_close(got, lam[:, None] * model.fc(own) + (1 - lam)[:, None] * model.fc(other))


# ------------------------------------------------------------------------------------------------------------- buffers


@pytest.mark.parametrize("in_folder", [False, True], ids=["memory", "folder"])
@pytest.mark.parametrize("form", FORMS)
def test_a_buffer_of_trees_holds_the_rows_of_one_of_tensors(form: str, in_folder: bool, tmp_path: Any) -> None:
    _, tree = FORMS[form]

    def made(name: str) -> ReplayBuffer:
        return ReplayBuffer(3, policy="balanced", seed=1, folder=tmp_path / name if in_folder else None)

    one, other = made("one"), made("other")
    for seed in range(4):
        pair = rows(6, seed)
        one.add(*formed(tree, pair), logits=pair[0][:, :2])
        other.add(*pair, logits=pair[0][:, :2])
    assert len(one) == len(other) == 3

    def check(mine: ReplayBuffer) -> None:
        assert torch.equal(joined(mine.x), other.x) and torch.equal(mine.y, other.y)
        assert torch.equal(mine.extras["logits"], other.extras["logits"]) and mine.extras.keys() == {"logits"}
        assert torch.equal(joined(mine.part(1, 3)[0]), other.part(1, 3)[0])
        assert torch.equal(joined(mine.draw_balanced(4, generator())[0]), other.draw_balanced(4, generator())[0])
        for _ in range(2):
            got, expected = mine.sample_with_extras(2, generator()), other.sample_with_extras(2, generator())
            assert torch.equal(joined(got.x), expected.x)
            assert torch.equal(got.extras["logits"], expected.extras["logits"])
        mine.prefetch(2)
        assert joined(mine.sample(2)[0]).shape == (2, IMAGE + TABLE)

    check(one)
    file = tmp_path / "state.pt"
    torch.save(one.state_dict(), file)
    one.close()
    again = made("one")
    again.load_state_dict(torch.load(file, weights_only=True))
    check(again)
    pair = rows(6, 9)
    again.add(*formed(tree, pair), logits=pair[0][:, :2])
    other.add(*pair, logits=pair[0][:, :2])
    check(again)
    again.close()
    other.close()


@pytest.mark.parametrize("form", ["mapping by keyword", "tuple", "list", "nested"])
def test_a_buffer_of_trees_is_a_source(form: str) -> None:
    kind, tree = FORMS[form]
    one, other = ReplayBuffer(4, seed=1), ReplayBuffer(4, seed=1)
    pair = rows(20, 2)
    one.add(*formed(tree, pair))
    other.add(*pair)
    torch.testing.assert_close(reference_gradient(kind(), one, chunk_size=3), reference_gradient(Joined(), other))


def test_the_order_of_a_mapping_does_not_matter() -> None:
    batch, buffer = (formed(FORMS["mapping by keyword"][1], rows(n, n)) for n in (7, 11))
    turned = {key: buffer[0][key] for key in ("table", "image")}, buffer[1]
    how: dict[str, Any] = {"estimator": "mixed", "criterion": "class", "lam": LAM}
    expected = select_pairs(Parts(), buffer, batch, candidates=buffer, generator=generator(), **how)
    assert_same(select_pairs(Parts(), turned, batch, candidates=turned, generator=generator(), **how), expected)
    how.pop("lam")
    a, b = (GradMix(Parts(), kept, generator=generator(), **how) for kept in (buffer, turned))
    assert_same(a.select(*batch), b.select(*batch))
    one = ReplayBuffer(20)
    one.add(*buffer)
    one.add(*turned)
    assert torch.equal(one.x["image"][11:], buffer[0]["image"])


def test_a_buffer_takes_rows_like_its_first() -> None:
    buffer, (x, y) = ReplayBuffer(4), texts(6, 1)
    buffer.add(x, y)
    cases: list[tuple[Any, type[Exception], str]] = [
        ({"ids": x["ids"]}, ValueError, r"x: got the parts x\['ids'\], expected x\['ids'\], x\['mask'\]"),
        (x["ids"], ValueError, r"x: got the parts x, expected x\['ids'\]"),
        (x | {"mask": x["mask"][:, :2]}, ValueError, r"x\['mask'\]: got samples of shape \(2,\), expected \(4,\)"),
        (x | {"mask": x["mask"].float()}, TypeError, r"x\['mask'\]: got dtype torch.float32, expected torch.float64"),
        (x | {"mask": x["mask"][:3]}, ValueError, r"x\['mask'\]: got 3 samples, expected 6"),
        (x | {"mask": None}, TypeError, r"x\['mask'\]: got NoneType, expected a torch.Tensor"),
    ]
    before = buffer.state_dict()
    for bad, error, message in cases:
        with pytest.raises(error, match=message):
            buffer.add(bad, y)
    after = buffer.state_dict()
    assert torch.equal(before["keys"], after["keys"]) and torch.equal(before["key_generator"], after["key_generator"])
    assert all(torch.equal(before["x"][key], after["x"][key]) for key in x)
