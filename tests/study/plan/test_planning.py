"""Plans: of this machine and of one that is not here, and what they make of bad input."""

import dataclasses
import json

import pytest
from tiny_run import model_dir, text_files, tiny_config  # noqa: F401 - fixtures

from gptvq_jax.config import from_config
from gptvq_jax.console.config_file import load_config
from gptvq_jax.methods.gptvq_settings import GPTVQSettings
from gptvq_jax.run.work import run_flop
from gptvq_jax.study.plan import plan, predict, table
from gptvq_jax.study.plan.devices import DEVICES
from gptvq_jax.study.plan.plan import make_plan
from gptvq_jax.study.plan.rates import Rates, divided, probe_config
from gptvq_jax.study.plan.shapes import model_shapes
from gptvq_jax.study.plan.table import plan_text
from gptvq_jax.study.plan.traffic import layer_launches, stage_bytes


def test_launches_are_those_of_the_programs_that_were_counted():
    """Of a layer of 8192 x 28672 on an H100; tests/ops/test_compile_gpu.py counts its parts."""
    two = GPTVQSettings(dim=2, bits=2.0, group_size=2048, em_iterations=0, seed="random")
    parts = {"sweep": 1811, "recode": 1141}
    assert layer_launches(two, 8192, 28672) == pytest.approx(
        parts["sweep"] + 2 * parts["recode"], rel=0.02
    )
    seeded = dataclasses.replace(two, seed="kmeans++", polish_rounds=0)
    alone = layer_launches(dataclasses.replace(two, polish_rounds=0), 8192, 28672)
    assert layer_launches(seeded, 8192, 28672) - alone == pytest.approx(112 * 232, rel=0.08)
    for dim, bits, size, of_20_steps in [(2, 2.0, 2048, 1004), (4, 2.0, 65536, 1504)]:
        fitted = GPTVQSettings(dim=dim, bits=bits, group_size=size, seed="random", polish_rounds=0)
        none = dataclasses.replace(fitted, em_iterations=0)
        steps = layer_launches(fitted, 8192, 28672) - layer_launches(none, 8192, 28672)
        assert fitted.em_iterations == 20 and steps == pytest.approx(112 * of_20_steps, rel=0.01)


def test_a_layer_without_room_for_the_kernel_launches_for_each_vector():
    settings = GPTVQSettings(dim=2, bits=2.0, group_size=2048, seed="random", em_iterations=0)
    wide = dataclasses.replace(settings, block_size=512, max_group_cols=512)
    assert layer_launches(wide, 8192, 28672) > 50 * layer_launches(settings, 8192, 28672)
    beam = dataclasses.replace(settings, beam=2)
    assert layer_launches(beam, 8192, 28672) > 50 * layer_launches(settings, 8192, 28672)


def test_a_plan_of_70b_prints_everything_that_it_assumes():
    found = make_plan(load_config("llama2_70b_2d"), "llama2_70b_2d", "h100")
    text = plan_text(json.loads(json.dumps(found)))
    assert found["basis"] == "predicted from published rates" and found["basis"] in text
    assert "NVIDIA H100 SXM" in text and "fits: 74.51 GiB" in text and "80 blocks" in text
    for line in found["assumptions"]:
        assert line in text
    assert found["seconds"] == pytest.approx(sum(s["seconds"] for s in found["stages"]))
    stages = {s["name"]: s for s in found["stages"]}
    # 2 FLOP for each weight of the blocks and token, and attention beside.
    least = 2 * 855_638_016 * 80 * 142 * 2048
    assert least < stages["forward"]["flop"] < 1.1 * least
    assert ("over an hour: products" in text) == (found["seconds"] > 3600)
    assert found["causes"]["launches"] == stages["quantize"]["launches"] * 4e-6


def test_a_slower_device_and_more_text_take_longer(tiny_config):  # noqa: F811
    def planned(device="h100"):
        return make_plan(tiny_config, "tiny", device, like="smollm2_135m")

    seconds = {device: planned(device)["seconds"] for device in DEVICES}
    assert seconds["v6e"] < seconds["v5e"] and seconds["h100"] < seconds["a100"]
    before = planned()["disk_peak"]["bytes"]
    tiny_config.calibration.num_windows = 2560
    assert planned()["seconds"] > seconds["h100"] and planned()["disk_peak"]["bytes"] > before


def test_files_that_the_host_keeps_are_copied_in_memory(tiny_config):  # noqa: F811
    """Until there are more of them than it has room for; what is waited for goes to the disk."""
    settings, (config, _) = from_config(tiny_config), model_shapes("x", "smollm2_135m")
    moved, device = stage_bytes(config, settings, 4)["evaluate"], DEVICES["h100"]
    assert moved.moved == 2 * moved.awaited > 0
    of_disk = predict.moved_seconds(moved, device, False) - moved.moved / device.host_link
    assert of_disk == pytest.approx(moved.moved / predict.FILES)
    kept = predict.moved_seconds(moved, device, True)
    saved = moved.awaited / predict.FILES - moved.awaited / predict.KEPT_FILES
    assert predict.moved_seconds(moved, device, False) - kept == pytest.approx(saved)
    texts = []
    for windows in (4, 10_000_000):
        tiny_config.calibration.num_windows = windows
        found = make_plan(tiny_config, "tiny", "h100", like="smollm2_135m")
        texts.append(" ".join(found["assumptions"]))
    assert "80% of which keep" in texts[0] and "80% of which do not keep" in texts[1]


def test_an_accelerator_opens_the_feed_forward_twice_and_keeps_no_file_of_it():
    settings, (config, _) = (
        from_config(load_config("llama2_70b_2d")),
        model_shapes("x", "llama2_70b"),
    )
    here, there = (stage_bytes(config, settings, 4, where) for where in ("cpu", "gpu"))
    c = settings.calibration
    file = 2 * c.all_windows * c.seqlen * 28672
    assert here["hessians"].moved - there["hessians"].moved == 80 * file
    assert here["advance"].moved - there["advance"].moved == 79 * file
    flop = {where: run_flop(config, settings, 4, where)["advance"] for where in ("cpu", "gpu")}
    gate_and_up = 2 * 2 * 8192 * 28672 * c.all_windows * c.seqlen * 79
    assert flop["gpu"] - flop["cpu"] == gate_and_up


def test_what_does_not_fit_is_said():
    found = {
        "memory_peaks": {"device": {"bytes": 2 << 30, "phase": "quantize"}},
        "memory": [{"phase": "quantize", "name": "block", "where": "device", "num_bytes": 2 << 30}],
        "one_memory": False,
        "base_bytes": 0,
        "compile_bytes": 0,
        "memory_room": 1 << 30,
    }
    assert "DOES NOT FIT: 1.00 GiB are there" in table._memory(found)


def test_seconds_lie_on_a_line_between_the_fewest_and_the_most_centroids():
    few, some, many = (GPTVQSettings(dim=2, bits=bits) for bits in (1.0, 2.0, 3.0))
    uses = [predict.Use("gptvq", s, 64, 64, 1.0) for s in (some, few, many)]
    assert [settings for _, settings, _ in predict.to_probe(uses)] == [few, many]
    rates = Rates(per_weight={few: 4.0, many: 64.0})
    assert predict.per_weight(rates, some) == pytest.approx(4 + 60 * (16 - 4) / (64 - 4))
    assert predict.per_weight(rates, few) == 4.0


def test_a_block_that_is_too_large_is_measured_with_its_widths_divided():
    config, _ = model_shapes("meta-llama/Llama-2-70b-hf", "llama2_70b_2d")
    small = probe_config(config)
    assert small.head_dim == 128 and small.hidden_size < 4096
    assert small.num_attention_heads // small.num_key_value_heads == 8
    assert divided(small, 1) == small


@pytest.mark.slow
def test_a_plan_of_this_machine(tiny_config, capsys):  # noqa: F811
    """It measures every rate that it uses, with a bar."""
    tiny_config.calibration.asymmetry, tiny_config.calibration.gradient_groups = 0.25, 1
    found = make_plan(tiny_config, "tiny")
    assert found["basis"] == plan.HERE and "measuring this machine" in capsys.readouterr().err
    assert all(stage["seconds"] >= 0 for stage in found["stages"]) and found["seconds"] > 0
    assert all(rate > 0 for rate in found["rates"]["stage_tflops"].values())
    assert found["base_bytes"] > 2**26
    text = plan_text(found)
    assert "to compile, where no program is kept" in text and "gradients" in text


def test_bad_input(tiny_config):  # noqa: F811
    with pytest.raises(ValueError, match="--device=h999 is none of h100, a100, v5e, v6e"):
        make_plan(tiny_config, "tiny", "h999")
    tiny_config.model = "somebody/something"
    with pytest.raises(ValueError, match="no config.json of 'somebody/something'.*--like"):
        make_plan(tiny_config, "tiny", "h100")
    with pytest.raises(ValueError, match="none of the published models"):
        make_plan(tiny_config, "tiny", "h100", like="llama9")
    found = make_plan(tiny_config, "tiny", "h100", like="smollm2_135m")
    assert found["blocks"] == 30 and "the published smollm2_135m" in found["assumptions"][0]


def test_narrow_products_take_their_own_rate(tiny_config):  # noqa: F811
    """A stage's FLOP stay; its seconds of products fall by the ratio of the rates."""
    tiny_config.calibration.asymmetry, device = 0.25, DEVICES["h100"]
    faster = device.bfloat16 / device.float32

    def planned(**fields):
        config = tiny_config.copy_and_resolve_references()
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
        found = make_plan(config, "tiny", "h100", like="smollm2_135m")
        return {stage["name"]: stage for stage in found["stages"]}, found

    plain, _ = planned()
    of_evaluation, found = planned(evaluation__products="bfloat16")
    before, after = (plans["evaluate"] for plans in (plain, of_evaluation))
    assert after["flop"] == before["flop"] and 2 * after["num_bytes"] == before["num_bytes"]
    products = [s["seconds"] - s["of_files"] for s in (before, after)]
    assert products[0] / products[1] == pytest.approx(faster)
    assert any("models evaluated in bfloat16" in line for line in found["assumptions"])
    seconds = {}
    for how in ("float32", "bfloat16", "bfloat16x3"):
        stages, found = planned(calibration__products=how)
        seconds[how] = stages["hessians"]["seconds"]
        assert stages["evaluate"] == plain["evaluate"]
    sums = seconds["float32"] - seconds["bfloat16"]  # what is saved of them
    of_sums = sums / (1 - 1 / faster)
    saved = seconds["float32"] - seconds["bfloat16x3"]
    assert saved == pytest.approx(of_sums * (1 - 3 / faster)) and of_sums > 0
    of_model, found = planned(calibration__model_products="bfloat16")
    assert any("the model on the calibration text in bfloat16" in s for s in found["assumptions"])
    for stage in ("forward", "advance"):
        products = [s[stage]["seconds"] - s[stage]["of_files"] for s in (plain, of_model)]
        assert products[0] / products[1] == pytest.approx(faster)
    less = plain["hessians"]["seconds"] - of_model["hessians"]["seconds"]
    both, _ = planned(calibration__model_products="bfloat16", calibration__products="bfloat16")
    saved = plain["hessians"]["seconds"] - both["hessians"]["seconds"]
    assert 0 < less == pytest.approx(saved - sums)
    solved, _ = planned(solve_products="bfloat16x3")
    assert solved["quantize"]["seconds"] < plain["quantize"]["seconds"]
    assert found["causes"]["products"] > 0


def test_each_program_that_is_not_measured_leaves_as_much_as_the_median():
    settings = from_config(load_config("smollm2_135m_2d"))
    config, _ = model_shapes("x", "smollm2_135m")
    every = [*predict.uses(config, settings), *predict.quick_uses(config, settings)]
    programs = {predict._program(use) for use in every}
    rates = Rates(program_bytes=[300, 70, 80])
    assert len(programs) > 3
    assert predict.compile_bytes(config, settings, rates) == 80 * (len(programs) - 3)
    assert predict.compile_bytes(config, settings, Rates(program_bytes=[9] * 99)) == 0
    assert predict.compile_bytes(config, settings, Rates()) == 0
