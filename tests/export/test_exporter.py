"""Exported files beside the network, in the engines' own interfaces; what is fixed, named and refused."""

import onnx
import onnxruntime
import openvino
import pytest
import torch

from support.exports import NET, pipeline, without_engine
from support.networks import CONDITIONS, relative_error, small
from unet_denoiser import Diffusion
from unet_denoiser.config.export import ExportConfig
from unet_denoiser.export import exporter
from unet_denoiser.export.check import BOUNDS, CheckedCase, require_precise
from unet_denoiser.export.exporter import ExportRequest, export_network

NAMES = ["x", "t", "class_labels", "vector", "context", "context_mask"]
NAMES += ["drop_class_labels", "drop_vector", "drop_context"]


def export(folder, model, config, process=None):
    return export_network(ExportRequest(model, process or Diffusion(), steps=[999, 499]), folder, config)


def call_args(batch, size, tokens, seed=3):
    """Draw inputs for CONDITIONS that the check of the export has not used."""
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(batch, 1, *size, generator=g),
        "t": 999 * torch.rand(batch, generator=g),
        "class_labels": torch.randint(0, 5, (batch,), generator=g),
        "vector": torch.randn(batch, 3, generator=g),
        "context": torch.randn(batch, tokens, 6, generator=g),
        "context_mask": torch.arange(tokens) < torch.randint(0, tokens + 1, (batch, 1), generator=g),
        **{f"drop_{name}": torch.rand(batch, generator=g) < 0.5 for name in ("class_labels", "vector", "context")},
    }


def original(model, args):
    args = dict(args)
    drop = {name.removeprefix("drop_"): args.pop(name) for name in list(args) if name.startswith("drop_")}
    with torch.no_grad():
        return model(**args, drop=drop)


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory):
    """A network with all conditions: in ONNX for any size, in the others for fixed ones."""
    folder, model = tmp_path_factory.mktemp("conditioned"), small(**NET, **CONDITIONS)
    export(folder / "onnx", model, ExportConfig("onnx"))
    for to in ("openvino", "torch"):
        export(folder / to, model, ExportConfig(to, image_size=(6, 9), batch_size=2))
    return folder, model


@pytest.mark.parametrize(("batch", "size", "tokens"), [(1, (8, 8), 3), (4, (7, 13), 1)])
def test_an_onnx_file_computes_what_the_network_does_at_any_size(conditioned, batch, size, tokens):
    folder, model = conditioned
    args = call_args(batch, size, tokens)
    session = onnxruntime.InferenceSession(str(folder / "onnx" / "network.onnx"))
    (found,) = session.run(["output"], {name: value.numpy() for name, value in args.items()})
    assert relative_error(torch.from_numpy(found), original(model, args)) < 1e-5


def test_the_others_compute_what_the_network_does_at_their_size(conditioned):
    folder, model = conditioned
    args = call_args(2, (6, 9), 77)
    wanted = original(model, args)
    compiled = openvino.compile_model(folder / "openvino" / "network.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled({name: value.numpy() for name, value in args.items()})["output"].copy()
    assert relative_error(torch.from_numpy(found), wanted) < 1e-5
    program = torch.export.load(folder / "torch" / "network.pt2").module()
    assert relative_error(program(*args.values()).detach(), wanted) < 1e-5


def test_inputs_keep_their_names(conditioned):
    folder, _ = conditioned
    session = onnxruntime.InferenceSession(str(folder / "onnx" / "network.onnx"))
    assert [port.name for port in session.get_inputs()] == NAMES
    model = openvino.Core().read_model(folder / "openvino" / "network.xml")
    assert [port.get_names() for port in model.inputs] == [{name} for name in NAMES]
    assert [port.get_names() for port in model.outputs] == [{"output"}]


def test_an_onnx_file_is_valid_and_whole(conditioned):
    folder, _ = conditioned
    onnx.checker.check_model(str(folder / "onnx" / "network.onnx"), full_check=True)
    assert {path.name for path in (folder / "onnx").iterdir()} == {
        "README.md",
        "example.npz",
        "network.onnx",
        "schedule.json",
    }


def test_large_weights_become_a_second_file(tmp_path, monkeypatch):
    from unet_denoiser.export import onnx_format

    monkeypatch.setattr(onnx_format, "_MAX_INLINE_BYTES", 1000)
    model = small(**NET)
    export(tmp_path / "out", model, ExportConfig("onnx", image_size=(8, 8), batch_size=1))
    assert (tmp_path / "out" / "network.onnx.data").stat().st_size > 10_000
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    session = onnxruntime.InferenceSession(str(moved / "network.onnx"))
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([30.0])
    with torch.no_grad():
        wanted = model(x, t)
    (found,) = session.run(None, {"x": x.numpy(), "t": t.numpy()})
    assert relative_error(torch.from_numpy(found), wanted) < 1e-5


def test_fixed_sizes_are_fixed_in_the_file(conditioned):
    folder, _ = conditioned
    inputs = openvino.Core().read_model(folder / "openvino" / "network.xml").inputs
    shapes = {port.any_name: list(port.shape) for port in inputs}
    assert shapes["x"] == [2, 1, 6, 9]
    assert shapes["context"] == [2, 77, 6]


@pytest.mark.parametrize(
    ("options", "size"),
    [({"dims": 1, "image_size": 12}, (9,)), ({"dims": 3, "image_size": 4, "attention_resolutions": ()}, (4, 3, 5))],
)
def test_signals_and_volumes(tmp_path, options, size):
    model = small(**NET | options)
    export(tmp_path / "out", model, ExportConfig("torch", image_size=size, batch_size=3))
    x, t = torch.randn(3, 1, *size), torch.full((3,), 7.0)
    with torch.no_grad():
        wanted = model(x, t)
    found = torch.export.load(tmp_path / "out" / "network.pt2").module()(x, t).detach()
    assert relative_error(found, wanted) < 1e-5


def test_bfloat16_keeps_the_timesteps_apart(tmp_path):
    """8 bits of t would make 993 to 999 one timestep."""
    model = small(**NET, model_channels=16)
    for block in (*model.encoder, *model.bottleneck, *model.decoder):
        for module in block.modules():
            if hasattr(module, "time_mlp"):
                module.time_mlp.weight.data.mul_(4)  # an output that depends on the time most of all
    report = export(tmp_path / "out", model, ExportConfig("torch", "bfloat16", image_size=(8, 8), batch_size=1))
    assert 1e-4 < report.error < BOUNDS["bfloat16"]
    inputs = {"x": torch.ones(1, 1, 8, 8).numpy()}
    network = exporter.open_network(
        tmp_path / "out" / exporter.NETWORK_FILES["torch"], ExportConfig("torch", "bfloat16"), ("x", "t")
    )
    with torch.no_grad():
        wanted = [model(torch.ones(1, 1, 8, 8), torch.tensor([t])) for t in (993.0, 999.0)]
    found = [torch.from_numpy(network(inputs | {"t": torch.tensor([t]).numpy()})[0]) for t in (993.0, 999.0)]
    difference = (wanted[1] - wanted[0]).square().mean().sqrt()
    assert difference > 0.02
    assert (found[1] - found[0] - wanted[1] + wanted[0]).square().mean().sqrt() < 0.5 * difference


def test_a_precision_that_overflows_is_refused_and_nothing_is_written(tmp_path):
    model = small(**NET)
    model.input_conv.weight.data.mul_(1e6)  # float32 holds it, and a norm brings it back
    with pytest.raises(ValueError, match=r"precision='float16': .* differs .* at most 0.01 is accepted"):
        export(tmp_path / "out", model, ExportConfig("torch", "float16", image_size=(8, 8), batch_size=1))
    assert list(tmp_path.iterdir()) == []


def test_the_bound_counts_the_worst_case_and_nan():
    good = [CheckedCase(0, 1, (8, 8), 1e-6), CheckedCase(999, 1, (8, 8), 9e-5)]
    assert require_precise(good, "float32") == 9e-5
    for bad in (2e-4, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"timestep 500 and size 4x5; at most 0.0001"):
            require_precise([*good, CheckedCase(500, 1, (4, 5), bad)], "float32")


def test_a_file_with_other_weights_is_refused(tmp_path, monkeypatch):
    without_engine(monkeypatch, small(seed=1, **NET))
    with pytest.raises(ValueError, match="differs from the network's"):
        export(tmp_path / "out", small(**NET), ExportConfig("torch", image_size=(8, 8), batch_size=1))
    assert list(tmp_path.iterdir()) == []
    without_engine(monkeypatch, small(**NET))
    export(tmp_path / "out", small(**NET), ExportConfig("torch", image_size=(8, 8), batch_size=1))


def test_refusals_come_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "_save", None)
    model = small(**NET)
    with pytest.raises(FileExistsError, match="exists; give a new name"):
        export(tmp_path, model, ExportConfig("onnx"))
    with pytest.raises(ValueError, match=r"image_size=\(8, 8, 8\) must be 1 or 2 numbers"):
        export(tmp_path / "out", model, ExportConfig("onnx", image_size=(8, 8, 8)))
    with pytest.raises(ValueError, match=r"weights in torch\.float16"):
        export(tmp_path / "out", model.half(), ExportConfig("onnx"))
    for wrong, message in (
        ({"to": "tensorrt"}, "to='tensorrt' is not one of"),
        ({"precision": "int4"}, "precision='int4' is not one of"),
        ({"to": "onnx", "precision": "bfloat16"}, "no bfloat16 convolutions for a CPU; give float32 or float16"),
        (
            {"to": "openvino", "precision": "bfloat16"},
            "would round the time as well, .* give float32 or float16 or int8",
        ),
        ({"to": "torch", "precision": "int8"}, "give float32 or bfloat16 or float16"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"image_size": (0, 4)}, r"image_size=\(0, 4\) must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ExportConfig(**wrong)


def test_a_missing_library_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(exporter, "is_installed", lambda name: name != "nncf")
    exporter.require_libraries(ExportConfig("openvino"))
    with pytest.raises(ImportError, match=r"to='openvino' needs nncf: pip install 'unet-denoiser\[export\]'"):
        exporter.require_libraries(ExportConfig("openvino", "int8"))


def test_int8_quantises_the_image_and_not_the_embeddings(tmp_path):
    from unet_denoiser.export.quantization import names_without_image
    from unet_denoiser.sampling.pipeline.exporting import export_pipeline

    made = pipeline(tmp_path, model_channels=16, num_classes=5)
    report = export_pipeline(made, tmp_path / "out", ExportConfig("openvino", "int8", (8, 8), 2))
    assert 1e-4 < report.error < BOUNDS["int8"]
    model = openvino.Core().read_model(tmp_path / "out" / "network.xml")
    embeddings = names_without_image(model)
    kinds = {node.get_friendly_name(): node.get_type_name() for node in model.get_ops()}
    assert {"Sin", "Cos"} <= {kinds[name] for name in embeddings}
    quantised = [node for node in model.get_ops() if node.get_type_name() == "FakeQuantize"]
    convolved = sum(kind == "Convolution" for kind in kinds.values())
    assert len(quantised) > 0.8 * convolved > 5
    consumers = [port.get_node() for node in quantised for port in node.output(0).get_target_inputs()]
    assert not [node for node in consumers if node.get_friendly_name() in embeddings]
