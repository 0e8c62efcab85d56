"""Flags of scripts that would have no effect beside the others are refused."""

import pytest
from documented import REPOSITORY, parsed

SWEEP = "python scripts/sweep.py --config=configs/sweeps/smollm2_dimensionality.py"
LAYERS = "python scripts/benchmark_layers.py"
TASKS = "python scripts/evaluate_tasks.py --checkpoint=DIR --tasks=a"
CHAT = "python scripts/chat.py --checkpoint=DIR"
LORA = "python scripts/lora.py --checkpoint=DIR --out=A"
SERVE = "python scripts/serve.py --checkpoint=DIR"
DECODE = "python scripts/benchmark_decode.py"
SERVING = "python scripts/benchmark_serving.py --checkpoint=DIR"
GENERATE = "python scripts/generate.py --checkpoint=DIR --prompt=a"


@pytest.mark.parametrize(
    "command, message",
    [
        (f"{GENERATE} --top_k=3", "--top_k has no effect at temperature 0, .* set --temperature=1"),
        (f"{GENERATE} --top_p=1.0", "--top_p has no effect at temperature 0"),
        (f"{GENERATE} --seed=3", "--seed has no effect at temperature 0"),
        (f"{GENERATE} --seed=9223372036854775808", "seed=9223372036854775808 must be from 0 to"),
        (f"{GENERATE} --top_p=1.5", "top_p=1.5 must be above 0"),
        (f"{GENERATE} --system=Short", "--system has no effect without a chat, .*; add --chat"),
        (f"{GENERATE} --dense --implementation=xla", "--implementation is of packed weights"),
        (f"{GENERATE} --model=M", "either --checkpoint=DIR or --model=NAME"),
        (f"{CHAT} --top_k=3", "--top_k has no effect at temperature 0, .* set --temperature=1"),
        (f"{CHAT} --seed=-1", "seed=-1 must be from 0 to"),
        (f"{CHAT} --temperature=-1", "temperature=-1.0 must be 0"),
        (f"{CHAT} --dense --implementation=xla", "--implementation is of packed weights"),
        (f"{SERVE} --model=M", "not installed|either --checkpoint=DIR or --model=NAME"),
        (f"{SERVE} --host=0.0.0.0", "not installed|--host=0.0.0.0 lets other machines in"),
        (f"{DECODE} --model=M --shapes=7b", "--shapes has no effect on a token of a model; leave"),
        (f"{DECODE} --model=M --plot=a.png", "--plot has no effect on a token of a model; leave"),
        (
            f"{DECODE} --context=3",
            "--context has no effect without a model; add --model=CHECKPOINT",
        ),
        (f"{DECODE} --llama_cpp=F16", "--llama_cpp has no effect without a model; add --model"),
        (f"{DECODE} --model=M --llama_cpp=Q9", "unknown format 'Q9' of llama.cpp; choose from F32"),
        (f"{SERVING} --killed=0.1", "--killed has no effect without short requests; add --requ"),
        (f"{SERVING} --clients=0", "--clients=0 must be integers of at least 1"),
        (f"{SERVING} --requests=9 --killed=2", "not installed|killed=2.0 must be from 0 to 1"),
        (f"{SERVING} --model=M", "not installed|either --checkpoint=DIR or --model=NAME"),
        (f"{TASKS} --system=Short", "--system has no effect without a chat, .*; add --chat"),
        (f"{TASKS} --num_fewshot=-1", "lm-eval is not installed|num_fewshot=-1 must be 0"),
        *(
            (f"python scripts/{command} --devices=999", "devices=999 must be 1 to [0-9]+, the dev")
            for command in (
                "quantize.py --config=configs/smollm2_135m_2d.py",
                "calibrate.py --config=configs/smollm2_135m_2d.py --output=A",
                "evaluate.py --checkpoint=DIR",
                "finetune.py --checkpoint=DIR --workdir=A",
            )
        ),
        (
            "python scripts/calibrate.py --add=A --add=B --output=C --devices=1",
            "--devices has no effect on files that are added up; leave it out",
        ),
        ("python scripts/calibrate.py --output=A", "either --config=FILE, .* or --add=FILE twice"),
        (
            "python scripts/calibrate.py --config=configs/smollm2_135m_2d.py --output=A "
            "--config.vq.dim=1",
            r"--config\.vq\.dim has no effect on statistics, which depend on model, num_blocks",
        ),
        ("python scripts/calibrate.py --add=A --output=B", "--add=A alone is no sum; give --add"),
        (
            "python scripts/quantize.py --config=configs/smollm2_135m_2d.py "
            "--config.calibration.statistics=A --config.calibration.inputs=float "
            "--config.calibration.asymmetry=0 --config.true_sequential=False "
            "--config.calibration.gradient_groups=0 --config.vq.dim=2 --config.vq.bits=2 "
            "--config.calibration.num_windows=4",
            r"--config\.calibration\.num_windows has no effect with calibration\.statistics, whose",
        ),
        (
            "python scripts/quantize.py --config=configs/smollm2_135m_2d.py "
            "--config.calibration.dataset_weights=(1.,)",
            r"dataset_weights has no effect on a single text; set --config\.calibration\.datasets",
        ),
        (f"{LORA} --rank=0", "--rank=0 must be at least 1"),
        (f"{LORA} --model=M", "either --checkpoint=DIR or --model=NAME"),
        (f"{LORA} --chat --num_windows=9", "--num_windows has no effect with --chat, which trains"),
        (f"{LORA} --num_windows=3", "--num_windows=3 are fewer than a batch of 4; set --num_win"),
        ("python scripts/evaluate.py --checkpoint=DIR --model=M", "either --checkpoint=DIR or"),
        ("python scripts/evaluate.py --against=B", "either --checkpoint=DIR or"),
        (
            "python scripts/ablate.py --tables=layers --config=configs/smollm2_135m_2d.py",
            "--config has no effect without model rows; add --tables=model",
        ),
        (
            "python scripts/ablate.py --tables=layers --config.vq.dim=1",
            r"--config\.vq\.dim has no effect without model rows",
        ),
        (
            "python scripts/ablate.py --tables=layers --settings=aqlm_2x8",
            "--settings=aqlm_2x8 must be one of 1d_2.125, .* trellis_2.13, ",
        ),
        (
            "python scripts/ablate.py --tables=layers --settings=2d_2.125,trellis_2.13 "
            "--rows='L = 8'",
            "--settings=2d_2.125 has no effect with these --rows; it has default; ",
        ),
        (
            "python scripts/ablate.py --tables=model --settings=2d_2.125",
            "--settings has no effect without layer rows; add --tables=layers",
        ),
        (
            "python scripts/ablate.py --rows='int8 embedding' --layers=DIR",
            "--layers has no effect without layer rows",
        ),
        (
            "python scripts/ablate.py --tables=model --config.tune.epochs=3",
            r"--config\.tune\.epochs has no effect .* set --config\.tune\.block=True",
        ),
        (
            "python scripts/quantize.py --config=configs/smollm2_135m_2d.py --config.vq.dim=8",
            r"vq\.bits=3\.0 must be such that .* a whole number from 1 to 12; dim is 8",
        ),
        (
            "python scripts/quantize.py --config=configs/smollm2_135m_2d.py --config.vq.beam=9",
            r"vq\.beam=9 must be 1 to 8",
        ),
        (
            "python scripts/quantize.py --config=configs/smollm2_135m_2d.py "
            "--config.vq.beam=2 --config.vq.polish_rounds=0",
            r"--config\.vq\.beam has no effect .* set --config\.vq\.polish_rounds=1 or more",
        ),
        (
            "python scripts/quantize.py --config=configs/smollm2_135m_2d.py "
            "--config.vq.scale_block_size=16",
            r"vq\.row_scales=True must be False unless scale_block_size is 0",
        ),
        (
            "python scripts/benchmark_pipeline.py --config=configs/smollm2_135m_2d.py "
            "--config.aqlm.beam=2",
            r"--config\.aqlm\.beam has no effect with method 'gptvq'",
        ),
        ("python scripts/benchmark_pipeline.py --workdir=tests", "there is no tests/metrics.jsonl"),
        (
            "python scripts/benchmark_pipeline.py --config=configs/smollm2_135m_2d.py "
            "--against=docs",  # read before hours of work
            "there is no docs/metrics.jsonl",
        ),
        (
            f"{LAYERS} --methods=gptvq,aqlm --settings=aqlm_2x8",
            "--methods=gptvq has no effect with --settings=aqlm_2x8; it has 1d_",
        ),
        (
            "python scripts/benchmark_big_layer.py --alone --settings=2d_2.125,aqlm_2x8",
            "--alone measures one setting; --settings names 2",
        ),
        (
            f"{SWEEP} --config.base.vq.dim=4",
            r"--config\.base\.vq\.dim has no effect where 'dimension' sets",
        ),
        (f"{SWEEP} --config.base.tune.epochs=3", r"--config\.base\.tune\.epochs has no effect .*"),
        (f"{SWEEP} --config.name=x", r"--config\.name is not to be set; set fields of all cells"),
        (f"{SWEEP}:layers --config.base.tune.block=True", "tune.block has no effect on layers"),
        (
            "python scripts/report.py --workdir=DIR --noprompts --prompt=a",
            "--prompt has no effect with --noprompts; leave that out",
        ),
        (
            "python scripts/report.py --workdir=docs,configs",  # several, by commas
            "docs is neither the work directory of a run nor of a sweep: .*; pass another --work",
        ),
        ("python scripts/benchmark_decode.py --batches=0", "--batches=0 must be integers of at"),
        ("python scripts/benchmark_memory.py --depths=six", "--depths=six must be integers of at"),
    ],
)
def test_a_flag_without_effect_is_refused(command, message, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("gptvq_jax.run.job.WorkDir", pytest.fail)
    with (
        parsed(command, monkeypatch) as module,
        pytest.raises((ValueError, OSError), match=message),
    ):
        module.main([])


QUANTIZE = "python scripts/quantize.py"
RUN = f"{QUANTIZE} --config=configs/smollm2_135m_2d.py"


@pytest.mark.parametrize(
    "command, line",
    [
        (f"{RUN} --config.vq.dim=two", "--config.vq.dim must be a whole number, not 'two'"),
        (f"{RUN} --config.vq.bits=two", "--config.vq.bits must be a number, not 'two'"),
        (f"{RUN} --config.tune.block=2", "--config.tune.block must be True or False, not '2'"),
        (f"{GENERATE} --max_tokens=two", "--max_tokens must be a whole number, not 'two'"),
        (f"{GENERATE} '--top_p=a: b'", "--top_p must be a number, not 'a: b'"),
        (f"{SERVE} --port=http", "--port must be a whole number, not 'http'"),
        (f"{GENERATE} --chat=maybe", "--chat must be True or False, not 'maybe'"),
        (
            f"{GENERATE} --dtype=int4",
            "flag --dtype=int4: value should be one of <float32|bfloat16>",
        ),
        (
            f"{QUANTIZE} --config=configs/sweeps/llama2_7b_table2.py --config.vq.dim=2",
            "configs/sweeps/llama2_7b_table2.py: it is the config of a sweep; give it to "
            "scripts/sweep.py",
        ),
        (
            "python scripts/sweep.py --config=smollm2_135m_2d:5b",
            f"{REPOSITORY}/configs/smollm2_135m_2d.py: '5b' is not one of 2b, 3b, 4b, smoke, "
            "ablation",
        ),
        (
            f"{QUANTIZE} --config={{}}",
            "{}: get_config returns nothing; end it with `return config`",
        ),
        ("python scripts/ablate.py --config={}", "{}: get_config returns nothing; end it with"),
        (f"{RUN} --config.vq.dimm=2", "no such field of the config: 'dimm"),
    ],
)
def test_a_value_that_cannot_be_is_one_line(command, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    file = tmp_path / "c.py"
    file.write_text("def get_config(): pass\n")
    with pytest.raises(SystemExit) as ended, parsed(command.format(file), monkeypatch):
        pass
    errors = capsys.readouterr().err
    assert ended.value.code == 1
    assert errors.startswith(f"error: {line.format(file)}") and errors.count("\n") == 1
