"""Check that local boxes give the module's scores, faster, and that the module is unreachable."""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bidfmkd_fast.black_box import APISpec, BlackBox, Budget, FunctionBlackBox, TorchBlackBox
from bidfmkd_fast.black_box.local.folding import fold_batch_norms
from bidfmkd_fast.errors import BadAnswer, BudgetExhausted, InputError, InputTypeError
from bidfmkd_fast.runtime.full_float32 import full_float32

SIZE = 20
SPEC = APISpec(4, (1, SIZE, SIZE), input_range=(-1.0, 1.0), name="small")
# A deep float32 net against itself in float64: about 1e-6 of the largest score; a wrong fold is off
# by 0.01 and more.
SCORES_TOLERANCE = 2e-5


def conv4(
    width: int = 8, channels: int = 1, affine: bool = True, momentum: bool = True
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(4):
        norm = nn.BatchNorm2d(width, affine=affine, track_running_stats=momentum)
        layers += [nn.Conv2d(channels, width, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * (SIZE // 16) ** 2, 4))


class Residual(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, images: Tensor) -> Tensor:
        inner = torch.relu(self.norm1(self.conv1(images)))
        return torch.relu_(self.norm2(self.conv2(inner)) + self.shortcut(images))


def residual() -> nn.Sequential:
    blocks = [Residual(1, 6, 1), Residual(6, 6, 1), Residual(6, 8, 2), Residual(8, 12, 2)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))


class Branching(nn.Module):
    """A module that cannot be traced, since it branches on the data; its child can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.features = conv4()

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images if images.abs().max() > 0 else images + 1)


class Viewing(nn.Module):
    """A module whose `view` refuses channels-last activations."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Linear(6 * SIZE * SIZE, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).view(len(images), -1))


class Tangled(nn.Module):
    """A module of batch norms that must not be folded.

    Their convolutions are shared, used twice, used without the batch norm, read elsewhere, hooked.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(1, 3, 3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(6))
        self.raw, self.read, self.hooked = (
            nn.Conv2d(1, 3, 3),
            nn.Conv2d(1, 3, 3),
            nn.Conv2d(1, 3, 3),
        )
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 3, 3))
        self.hooked.register_forward_hook(lambda layer, inputs, output: output.abs())
        self.head = nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        raw = self.raw(images)
        out = self.norms[0](self.shared(images)) + self.norms[1](self.shared(images + 1))
        out = (
            out
            + self.norms[2](raw) * raw
            + self.norms[3](self.read(images)) * self.read.weight.mean()
        )
        out = out + self.norms[4](self.hooked(images)) + self.norms[5](self.normed(images))
        return self.head(torch.sin(out).mean((2, 3)))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = conv4()

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images.sub_(0.25).div_(0.5))


def trained(module: nn.Module, seed: int) -> nn.Module:
    """Return the module in eval() with weights and statistics as after a training."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return module.eval()


def images_of(n: int, seed: int) -> Tensor:
    return (
        torch.rand(n, *SPEC.image_shape, generator=torch.Generator().manual_seed(seed)) * 2.2 - 1.1
    )


def assert_same_scores(scores: Tensor, module: nn.Module, images: Tensor) -> None:
    """Check that scores equal the plain module's in float64, and that they depend on the images."""
    with torch.no_grad():
        wanted = copy.deepcopy(module).double()(images.double())
    assert wanted.std(0).max() > 1e-3 * wanted.abs().max()
    assert (scores - wanted).abs().max() <= SCORES_TOLERANCE * wanted.abs().max()


MODULES: list[Callable[[], nn.Module]] = [
    conv4,
    lambda: conv4(affine=False),
    lambda: conv4(width=5),
    residual,
    Branching,
    Viewing,
    Tangled,
    InPlace,
]
MODULE_NAMES = [
    "conv4",
    "conv4-not-affine",
    "conv4-odd",
    "residual",
    "branching",
    "viewing",
    "tangled",
    "in-place",
]


@pytest.mark.parametrize("build", MODULES, ids=MODULE_NAMES)
def test_scores_are_those_of_the_plain_module(build: Callable[[], nn.Module], seed: int) -> None:
    module = trained(build(), seed)
    images = images_of(37, seed)
    before = images.clone()
    for micro_batch in (None, 8, 1):
        assert_same_scores(
            TorchBlackBox(module, SPEC, micro_batch=micro_batch)(images), module, before
        )
    assert images.equal(before)


def batch_norms(module: nn.Module) -> int:
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in module.modules())


@pytest.mark.parametrize(
    ("build", "left"), [(conv4, 0), (residual, 0), (Branching, 0), (Viewing, 0), (Tangled, 6)]
)
def test_what_is_folded(build: Callable[[], nn.Module], left: int, seed: int) -> None:
    module = trained(build(), seed)
    folded = copy.deepcopy(module)
    fold_batch_norms(folded)
    assert batch_norms(module) > 0 and batch_norms(folded) == left
    images = images_of(5, seed)
    with torch.no_grad():
        assert_same_scores(folded(images), module, images)


class Operations(TorchDispatchMode):
    """Notes the batch norms that run, and size and memory format of each convolution's output."""

    def __init__(self) -> None:
        super().__init__()
        self.n_batch_norms = 0
        self.convolutions: list[tuple[int, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.n_batch_norms += "batch_norm" in str(func)
        if "conv" in str(func):
            self.convolutions.append(
                (len(output), output.is_contiguous(memory_format=torch.channels_last))
            )
        return output


def test_serves_folded_channels_last_micro_batches(seed: int) -> None:
    module = trained(conv4(), seed)
    images = images_of(10, seed)
    with torch.no_grad(), Operations() as plain:
        module(images)
    assert plain.n_batch_norms == 4 and not all(
        channels_last for _, channels_last in plain.convolutions
    )
    api = TorchBlackBox(module, SPEC, micro_batch=4)
    with Operations() as served:
        api(images)
    assert served.n_batch_norms == 0
    assert (
        served.convolutions == [(4, True)] * 8 + [(2, True)] * 4
    )  # ten images in fours, four convolutions each


def test_batch_statistics_are_neither_folded_nor_split(seed: int) -> None:
    module = trained(conv4(momentum=False), seed)
    images = images_of(300, seed)
    assert_same_scores(TorchBlackBox(module, SPEC)(images), module, images)
    with pytest.raises(InputError, match="small: micro_batch=8 would change the scores"):
        TorchBlackBox(module, SPEC, micro_batch=8)


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore:The .grad attribute:UserWarning"
)
def test_script_modules(seed: int) -> None:
    module = trained(conv4(), seed)
    images = images_of(9, seed)
    assert_same_scores(
        TorchBlackBox(torch.jit.script(copy.deepcopy(module)), SPEC)(images), module, images
    )


def test_the_callers_module_is_left_alone(seed: int) -> None:
    module = trained(conv4(), seed).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    api = TorchBlackBox(module, SPEC)
    images = images_of(6, seed)
    scores = api(images)
    assert module.training and all(parameter.requires_grad for parameter in module.parameters())
    assert all(tensor.equal(before[name]) for name, tensor in module.state_dict().items())
    assert module[0].weight.is_contiguous()  # type: ignore[index, operator]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert api(images).equal(scores)


def test_a_noisy_module_keeps_its_noise() -> None:
    class Noisy(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :4] + torch.rand(1)

    api = TorchBlackBox(Noisy(), SPEC)
    images = images_of(2, 0)
    assert not api(images).equal(api(images))


def test_building_draws_nothing_from_the_global_generator(seed: int) -> None:
    module = trained(nn.Sequential(conv4(), nn.Dropout()), seed)
    torch.manual_seed(seed)
    wanted = torch.rand(3)
    torch.manual_seed(seed)
    TorchBlackBox(module, SPEC)
    assert torch.rand(3).equal(wanted)


def test_full_float32_under_autocast_and_reduced_precision(seed: int) -> None:
    module = trained(conv4(), seed)
    api = TorchBlackBox(module, SPEC)
    images = images_of(9, seed)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = api(images)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)
    assert_same_scores(scores, module, images)


def precision_settings() -> list[object]:
    backends = torch.backends
    return [
        backends.cudnn.allow_tf32,
        backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision(),
    ]


def test_precision_settings_come_back_when_the_last_thread_leaves() -> None:
    before = precision_settings()
    entered, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with full_float32():
            entered.set()
            leave.wait(10)

    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        thread = threading.Thread(target=stay)
        thread.start()
        entered.wait(10)
        with full_float32():
            assert torch.backends.cuda.matmul.allow_tf32 is False
        assert torch.backends.cuda.matmul.allow_tf32 is False  # the other thread is still inside
        leave.set()
        thread.join()
        assert precision_settings() == [True, True, "high"]
        with pytest.raises(ZeroDivisionError), full_float32():
            _ = 1 / 0
        assert precision_settings() == [True, True, "high"]
    finally:
        leave.set()
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = (
            before[1],
            before[0],
        )
    assert precision_settings() == before


# --- closedness


def reachable(root: object, depth: int = 6) -> list[object]:
    """Return what public attributes, containers and methods without arguments lead to."""
    seen: dict[int, object] = {}
    layer = [root]
    for _ in range(depth):
        following: list[object] = []
        for thing in layer:
            if id(thing) in seen or isinstance(
                thing, (type, types.ModuleType, str, int, float, types.FunctionType)
            ):
                continue
            seen[id(thing)] = thing
            if isinstance(thing, (list, tuple, set, frozenset)):
                following += thing
            elif isinstance(thing, dict):
                following += [*thing.keys(), *thing.values()]
            elif not isinstance(
                thing, (types.MethodType, types.BuiltinMethodType)
            ) and not is_inside(thing):
                for name in dir(thing):
                    if name.startswith("_"):
                        continue
                    value = getattr(thing, name)
                    following.append(value)
                    if inspect.ismethod(value) and not any(
                        parameter.default is parameter.empty
                        for parameter in inspect.signature(value).parameters.values()
                    ):
                        with contextlib.suppress(InputError):  # calls that are refused
                            following.append(value())
        layer = following
    return list(seen.values())


def is_inside(thing: object) -> bool:
    return isinstance(thing, (Tensor, nn.Module))


def test_the_walk_finds_what_is_not_hidden(seed: int) -> None:
    class Open(TorchBlackBox):
        @property
        def layers(self) -> dict[str, object]:
            return {"first": [nn.Linear(1, 1)]}

    assert any(map(is_inside, reachable(Open(trained(conv4(), seed), SPEC))))


def test_no_module_parameter_or_gradient_is_reachable(seed: int) -> None:
    api = TorchBlackBox(trained(conv4(), seed), SPEC, budget=Budget(100))
    api(images_of(3, seed))
    assert not any(map(is_inside, reachable(api)))
    assert not any(map(is_inside, vars(api).values()))
    public = {name for name in dir(api) if not name.startswith("_")}
    assert public == {name for name in dir(BlackBox) if not name.startswith("_")} | {
        "device",
        "first_answers",
    }
    assert not isinstance(api, nn.Module)
    assert not any(map(is_inside, reachable(FunctionBlackBox(conv4().eval(), SPEC))))


def test_scores_carry_no_gradient_to_images_or_parameters(seed: int) -> None:
    images = images_of(3, seed).requires_grad_()
    scores = TorchBlackBox(trained(conv4(), seed), SPEC)(images)
    assert (
        scores.grad_fn is None
        and not scores.requires_grad
        and scores._base is None
        and not scores.is_inference()
    )
    with pytest.raises(RuntimeError, match="does not require grad"):
        scores.sum().backward()
    assert images.grad is None


def test_threads_get_their_own_scores(seed: int) -> None:
    module = trained(conv4(), seed)
    api = TorchBlackBox(module, SPEC, micro_batch=4, budget=Budget(8 * 5 * 9))
    wanted = {index: api_scores(module, images_of(9, seed + index)) for index in range(8)}
    failures: list[object] = []

    def ask(index: int) -> None:
        try:
            for _ in range(5):
                torch.testing.assert_close(api(images_of(9, seed + index)), wanted[index])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert (api.ledger.queries, api.ledger.requests) == (8 * 5 * 9, 8 * 5)
    with pytest.raises(BudgetExhausted):
        api(images_of(1, seed))


def api_scores(module: nn.Module, images: Tensor) -> Tensor:
    return TorchBlackBox(module, SPEC)(images)


# --- refusals


def test_micro_batches_are_one_request(seed: int) -> None:
    api = TorchBlackBox(trained(conv4(), seed), SPEC, micro_batch=4)
    api(images_of(30, seed))
    assert (api.ledger.queries, api.ledger.requests) == (30, 1)


class Answers(nn.Module):
    def __init__(self, answer: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images: Tensor) -> object:
        return self.answer(images)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda images: images.flatten(1),
            r"floating scores \[2, 4\]; it returned torch.float32 \[2, 400\]",
        ),
        (lambda images: (images.flatten(1)[:, :4],), "it returned tuple"),
        (lambda images: images.flatten(1)[:, :4].long(), "it returned torch.int64"),
        (
            lambda images: images @ torch.zeros(3, 3),
            r"small: module failed on images \[2, 1, 20, 20\]",
        ),
    ],
)
def test_modules_that_do_not_fit_the_spec_are_refused_at_once(
    answer: Callable[[Tensor], object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        TorchBlackBox(Answers(answer), SPEC)


def test_an_answer_that_goes_wrong_later_is_a_bad_answer(seed: int) -> None:
    squeezing = Answers(lambda images: images.flatten(1)[:, :4].squeeze(0))
    api = TorchBlackBox(squeezing, SPEC, micro_batch=2)
    with pytest.raises(BadAnswer, match=r"small: module must answer \[1, 4\]; it answered \[4\]"):
        api(images_of(5, seed))
    with pytest.raises(BadAnswer, match="NaN"):
        TorchBlackBox(Answers(lambda images: images.flatten(1)[:, :4] * float("nan")), SPEC)(
            images_of(1, seed)
        )


def test_bad_arguments() -> None:
    with pytest.raises(
        InputTypeError, match="small: module must be a torch.nn.Module; got function"
    ):
        TorchBlackBox(lambda images: images, SPEC)  # type: ignore[arg-type]
    with pytest.raises(InputTypeError, match="micro_batch must be an int"):
        TorchBlackBox(conv4(), SPEC, micro_batch=2.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="micro_batch must be at least 1; got 0"):
        TorchBlackBox(conv4(), SPEC, micro_batch=0)
    with pytest.raises(InputError, match="small: module cannot be copied to"):
        TorchBlackBox(conv4(), SPEC, device="no-such-device")
    with pytest.raises(InputTypeError, match="small: function must be callable; got int"):
        FunctionBlackBox(3, SPEC)  # type: ignore[arg-type]
    with pytest.raises(InputTypeError, match="spec must be an APISpec"):
        TorchBlackBox(conv4(), None)  # type: ignore[arg-type]


def test_function_black_box(seed: int) -> None:
    weight = torch.ones(4, requires_grad=True)
    sizes: list[int] = []

    def function(images: Tensor) -> Tensor:
        sizes.append(len(images))
        assert not torch.is_grad_enabled()
        return images.mul_(3).flatten(1)[:, :4] * weight

    images = images_of(5, seed)
    before = images.clone()
    api = FunctionBlackBox(function, SPEC, budget=Budget(5))
    scores = api(images)
    torch.testing.assert_close(scores, before.flatten(1)[:, :4] * 3)
    assert images.equal(before) and not scores.requires_grad
    assert (sizes, api.ledger.queries, api.ledger.requests) == ([5], 5, 1)
    with pytest.raises(BudgetExhausted):
        api(images)
    assert sizes == [5]


class Labels(nn.Module):
    """A module that gives labels only."""

    def __init__(self, shape: tuple[int, ...] = (-1,)) -> None:
        super().__init__()
        self.shape = shape
        self.body = nn.Sequential(
            nn.BatchNorm2d(1),
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.Flatten(),
            nn.Linear(144, 3),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images).argmax(1).view(self.shape)


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_a_module_of_labels_is_served_as_it_is(shape: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    module = Labels(shape).eval()
    nn.init.constant_(module.body[0].running_mean, 0.5)  # so that classes differ between images
    nn.init.constant_(module.body[0].running_var, 0.01)
    spec = APISpec(3, (1, 8, 8), scores_kind="labels", name="tags")
    images = torch.rand(50, 1, 8, 8)
    with torch.no_grad():
        wanted = nn.functional.one_hot(module.body(images).argmax(1), 3).float()
    assert len(set(wanted.argmax(1).tolist())) > 1
    for served in (module, module.body):  # of scores, too, only the class comes out
        box = TorchBlackBox(served, spec, micro_batch=16)
        assert torch.equal(box(images), wanted)
    with pytest.raises(InputError, match="tags: module must map images .* to floating scores"):
        TorchBlackBox(module, APISpec(3, (1, 8, 8), name="tags"))
    with pytest.raises(InputError, match=r"tags: the API must answer one label .* \[2, 3\]"):
        TorchBlackBox(module.body, APISpec(4, (1, 8, 8), scores_kind="labels", name="tags"))
