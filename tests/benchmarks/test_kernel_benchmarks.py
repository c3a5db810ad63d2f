"""The kernel benchmarks on toy shapes: statistics, accounting of work, accuracy columns, failures, variants."""

import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import environment, options, run, timing
from benchmarks.loss import accuracy, gemm_sweep, measure, memory_probe, methods, our_engines, peers, problems
from benchmarks.pages import loss as loss_pages

CPU = torch.device("cpu")
FLOAT32 = torch.float32
TOY = problems.TOY_SHAPE


@pytest.fixture(scope="module")
def batch() -> problems.Batch:
    weight = problems.make_weight(TOY, CPU, FLOAT32, 0)
    return problems.make_batch(TOY, weight, "peaked", 1)


# Statistics


def test_quantiles_of_a_known_list():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert timing.quantile(values, 0.5) == 3.0
    assert timing.quantile(values, 0.1) == pytest.approx(1.4)  # position 0.4 between 1 and 2
    assert timing.quantile([1.0, 2.0], 0.5) == 1.5
    assert timing.quantile([7.0], 0.9) == 7.0
    found = timing.summarise(values)
    assert (found.median_ms, found.p10_ms, found.p90_ms, found.repetitions) == (3.0, pytest.approx(1.4), 4.6, 5)


class _FakeClock:
    """Takes its times from a list a name; the calls say which one."""

    device = CPU

    def synchronize(self) -> None:
        pass

    def time_ms(self, call):
        return call()


def test_competitors_take_turns_and_a_failing_one_leaves_the_rest_alone():
    order = []

    def steady(name, ms):
        def call(turn):
            order.append((name, turn))
            return ms + turn

        return call

    def broken(turn):
        if turn == 1:
            raise ValueError("no luck\nat all")
        return 1.0

    calls = {"a": steady("a", 10.0), "broken": broken, "b": steady("b", 20.0)}
    found = timing.interleave(calls, _FakeClock(), repetitions=3, min_repetitions=1, warm_ups=0)
    assert order == [("a", 0), ("b", 0), ("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert found["a"] == timing.Timing(11.0, 10.2, 11.8, 3)
    assert found["b"].median_ms == 21.0
    assert found["broken"] == timing.Failure("ValueError: no luck at all")
    assert list(found) == ["a", "broken", "b"]


def test_slow_competitors_get_fewer_repetitions_and_ours_three_shares():
    calls = {"fast": lambda turn: 1.0, "slow": lambda turn: 200.0, "ours": lambda turn: 200.0}
    # 5 shares of 1 s: 1 s / 200 ms = 5 repetitions for "slow", 15 for "ours".
    found = timing.interleave(
        calls, _FakeClock(), repetitions=20, min_repetitions=2, seconds=5.0, favoured=frozenset({"ours"})
    )
    assert [found[name].repetitions for name in calls] == [20, 5, 15]


def test_gpu_state_ignores_lines_that_are_cut():
    found = timing.summarise_gpu(["1980, 600.5, 60", "1500, 700.5, 65", "19", "[N/A], 3, 4", "1900, 650.5, 62"])
    assert found == {
        "clock_mhz": 1900.0,
        "lowest_clock_mhz": 1500.0,
        "power_w": 650.5,
        "highest_temperature_c": 65.0,
        "samples": 3,
    }
    assert timing.summarise_gpu([]) is None


# Inputs and accounting


@pytest.mark.parametrize("tokens", [4, 96, 2048, 16384])
def test_lengths_add_up(tokens):
    shape = problems.Shape(tokens=tokens, hidden_size=8, vocab_size=16)
    lengths = problems.draw_lengths(tokens, shape.num_sequences, torch.Generator().manual_seed(0))
    assert lengths.sum() == tokens
    assert lengths.min() >= 1
    assert len(lengths) == shape.num_sequences


def test_inputs_have_the_log_probs_they_promise():
    shape = problems.Shape(tokens=1024, hidden_size=256, vocab_size=2048)
    weight = problems.make_weight(shape, CPU, FLOAT32, 0)
    peaked = problems.make_batch(shape, weight, "peaked", 1)
    assert -0.45 < peaked.mean_logprob < -0.2
    flat = problems.make_batch(shape, weight, "flat", 1)
    assert flat.mean_logprob == pytest.approx(-math.log(2048) - 0.5, abs=0.15)  # logits of variance 1


def test_operations_are_counted_from_the_shape():
    shape = problems.Shape.parse("T16384-H4096-V151936")
    assert shape.operations(6) == 6 * 16384 * 4096 * 151936
    assert shape == problems.GPU_FIRST == problems.gpu_grid()[0]
    assert len({s.name for s in problems.gpu_grid()}) == 40
    # 6.12e13 operations in 100 ms: 612 TFLOP/s; an 8 THV method computes a third more.
    found = measure.rates(timing.Timing(100.0, 99.0, 101.0, 5), shape, own_thv=8, common_thv=6)
    assert found["common_tflops"] == pytest.approx(611.8, abs=0.1)
    assert found["own_tflops"] / found["common_tflops"] == pytest.approx(8 / 6)


def _count_thv(method: methods.Method, batch: problems.Batch, mode: str) -> float:
    """THV of the matrix products that PyTorch's own counter sees."""
    with FlopCounterMode(display=False) as counter:
        methods.run_step("logprobs", method, batch, mode)
    return counter.get_total_flops() / batch.shape.operations(1)


@pytest.mark.parametrize("mode", problems.MODES)
def test_thv_of_plain_torch_is_what_torch_counts(batch, mode):
    naive = methods.torch_makers()["naive"]()
    assert naive.thv(mode, batch) == pytest.approx(_count_thv(naive, batch, mode))
    assert naive.thv(mode, batch) == problems.COMMON_THV[mode]


def test_thv_of_a_long_sequence_counts_the_second_pass(batch):
    row_bytes = 4 * TOY.vocab_size
    lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()
    assert our_engines.planned_thv("full", batch, {}) == 6.0
    rows = max(lengths) - 1  # a workspace that small holds no second [V, H] matrix
    given = {"workspace_bytes": rows * row_bytes}
    twice = sum(length for length in lengths if length > rows)
    assert our_engines.planned_thv("full", batch, given) == pytest.approx(6 + 2 * twice / sum(lengths))
    assert our_engines.planned_thv("forward", batch, given) == 2.0


# Accuracy


@pytest.mark.parametrize("case", ["trajectory_balance", "logprobs"])
def test_the_oracle_is_autograd_in_float64(case, batch):
    exact = accuracy.oracle(case, batch, torch.float64)
    hidden = batch.hidden.double().requires_grad_()
    weight = batch.head_weight.double().requires_grad_()
    logprobs = (hidden @ weight.T).log_softmax(-1)[torch.arange(TOY.tokens), batch.token_ids]
    if case == "logprobs":
        loss = (logprobs * batch.token_weights.double()).sum()
    else:
        owner = torch.repeat_interleave(torch.diff(batch.cu_seqlens))
        log_ratio = torch.zeros(TOY.num_sequences, dtype=torch.float64)
        log_ratio = log_ratio.index_add(0, owner, logprobs - batch.ref_logprobs.double())
        loss = (0.05 * (batch.log_z.double() + log_ratio) - batch.rewards.double()).square().mean() / (2 * 0.05)
    loss.backward()
    torch.testing.assert_close(exact.loss, loss.detach())
    assert hidden.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(exact.hidden_grad, hidden.grad.float())
    torch.testing.assert_close(exact.weight_grad, weight.grad.float())


def _naive_variant(name: str, change) -> methods.Method:
    return methods.Method(
        name=name,
        logprobs=lambda hidden, weight, ids: change(hidden, weight, ids),
        thv=methods.fixed_thv(2, 4, 6),
    )


WRONG = {
    "exact": lambda hidden, weight, ids: methods.naive_logprobs(hidden, weight, ids),
    "rounded": lambda hidden, weight, ids: methods.logprobs_of_logits((hidden @ weight.T).bfloat16(), ids),
    "drops a column": lambda hidden, weight, ids: (
        methods.naive_logprobs(hidden, weight, ids)
        + (hidden @ weight.T)[:, 1:].logsumexp(-1).neg()
        + (hidden @ weight.T).logsumexp(-1)
    ),
}


def test_a_wrong_competitor_shows_large_errors(batch, monkeypatch):
    found = {}
    makers = {name: (lambda name=name: _naive_variant(name, WRONG[name])) for name in WRONG}
    monkeypatch.setattr(measure, "torch_makers", lambda: makers)
    monkeypatch.setattr(measure, "peer_makers", lambda device, dtype: {})
    measured = measure.Measurement("trajectory_balance", measure.toy_arguments(modes=("forward",)))
    cell = measured.cell(TOY, "peaked", True, lambda cell: None)
    found = {row["name"]: row["accuracy"] for row in cell["rows"] if "accuracy" in row}
    for name in ("exact", "ours"):
        assert found[name]["sequence_max_nats"] < 1e-4, name
        assert max(found[name][f"{key}_grad_relative"] for key in ("hidden", "weight")) < 1e-5, name
    # bfloat16 logits: 8 bits of values near 8, thousandths of nats per token at least, and as much in the gradients
    assert found["rounded"]["sequence_max_nats"] > 1e-2
    assert found["rounded"]["hidden_grad_relative"] > 1e-3
    assert found["drops a column"]["token_max_nats"] > 100 * found["exact"]["token_max_nats"]
    assert found["drops a column"]["weight_grad_relative"] > 100 * found["exact"]["weight_grad_relative"]
    assert found["rounded"]["sequence_rms_nats"] <= found["rounded"]["sequence_max_nats"]


def test_relative_error_is_frobenius_and_sees_nan():
    exact = torch.tensor([[3.0, 4.0]])
    assert accuracy.relative_error(torch.tensor([[3.0, 4.5]]), exact) == pytest.approx(0.1)
    assert math.isnan(accuracy.relative_error(torch.full((1, 2), math.nan), exact))


# Skipping and failing


def test_missing_peers_are_skipped_by_name_and_failing_ones_have_a_row(monkeypatch, tmp_path, capsys):
    def missing() -> methods.Method:
        raise methods.UnavailableError("nowhere to be found")

    def explode(hidden, weight, ids):
        raise RuntimeError("kernel said no")

    def dies_in_backward(hidden, weight, ids):
        out = methods.naive_logprobs(hidden, weight, ids)
        if torch.is_grad_enabled():
            out.register_hook(lambda grad: 1 / 0)
        return out

    makers = {
        "absent": missing,
        "explodes": lambda: _naive_variant("explodes", explode),
        "no backward": lambda: _naive_variant("no backward", dies_in_backward),
        "naive": methods.torch_makers()["naive"],
    }
    monkeypatch.setattr(measure, "torch_makers", lambda: makers)
    monkeypatch.setattr(measure, "peer_makers", lambda device, dtype: {})
    result = measure.measure("logprobs", measure.toy_arguments(exclude=("ours",)), tmp_path / "x.json")
    rows = {row["name"]: row for row in result["cells"][0]["rows"]}
    assert rows["absent"]["reason"] == "nowhere to be found"
    assert (rows["explodes"]["status"], rows["explodes"]["reason"]) == ("failed", "RuntimeError: kernel said no")
    assert rows["no backward"]["reason"].startswith("ZeroDivisionError")
    assert rows["ours"] == {"name": "ours", "status": "skipped", "modes": {}, "reason": "excluded from this run"}
    assert rows["naive"]["modes"]["full"]["repetitions"] == 2
    assert rows["ceiling: three GEMMs"]["modes"]["full"]["own_thv"] == 6.0
    shown = capsys.readouterr().out
    assert "skipped absent: nowhere to be found" in shown
    assert "| explodes" in shown
    assert "failed: RuntimeError: kernel said no" in shown
    written = json.loads((tmp_path / "x.json").read_text())
    assert [cell["name"] for cell in written["cells"]] == [TOY.name]


def test_every_peer_is_a_method_or_says_why_not():
    for name, make in peers.peer_makers(CPU, FLOAT32).items():
        reason = ""
        try:
            reason = make().name
        except methods.UnavailableError as error:
            reason = f"{name}: {error}"
        assert reason.startswith(name)
        assert not reason.endswith(": ")


def test_a_run_out_of_time_lists_what_it_did_not_reach_and_a_resumed_one_keeps_what_it_has(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "peer_makers", lambda device, dtype: {})
    path, other = tmp_path / "x.json", "T64-H32-V256"
    given = {"only": ("naive",), "exclude": ("torch.compile of naive",), "modes": ("forward",)}
    late = measure.toy_arguments(shapes=(TOY.name, other), seconds=1e-9, **given)
    assert measure.measure("logprobs", late, path)["not_reached"] == [f"{TOY.name} peaked", f"{other} peaked"]
    measure.measure("logprobs", measure.toy_arguments(**given), path)
    before = json.loads(path.read_text())["cells"][0]
    both = measure.toy_arguments(shapes=(TOY.name, other), resume=True, **given)
    cells = measure.measure("logprobs", both, path)["cells"]
    assert [cell["name"] for cell in cells] == [TOY.name, other]
    assert cells[0] == before
    half = measure.toy_arguments(dtype="bfloat16", resume=True, **given)
    cells = measure.measure("logprobs", half, path)["cells"]
    assert [(cell["name"], cell["dtype"]) for cell in cells] == [
        *((name, "float32") for name in (TOY.name, other)),
        (TOY.name, "bfloat16"),
    ]
    page = loss_pages.kernels(environment.read_json(path))
    assert page.count("| naive |") == 2
    assert "Measured at commit" not in page
    kept = environment.read_json(path)
    kept["cells"][0]["commit"] = "abc1234"
    assert "Measured at commit abc1234." in loss_pages.kernels(kept)
    assert all(f", {dtype}, " in page.replace("\n", " ") for dtype in ("float32", "bfloat16"))


# Commands


def test_options_come_from_the_sentences_under_the_fields(capsys):
    found = options.parse(measure.Arguments, ["--only", "a", "b", "--seconds", "2.5", "--no-memory"], "x")
    assert (found.only, found.seconds, found.memory, found.quick) == (("a", "b"), 2.5, False, False)
    with pytest.raises(SystemExit) as stop:
        options.parse(measure.Arguments, ["--help"], "x")
    assert stop.value.code == 0
    assert "peaked, flat or both." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["gpu_visit", "--out", "unused"], "torch finds no GPU on this machine: give --rehearse to try it on a CPU"),
        (["gpu_visit", "--rehearse", "--visit", "c"], "--visit 'c': the visits are a and b"),
        (["trajectory_balance", "--shapes", "16384"], "T16384-H4096-V151936"),
        (["logprobs", "--modes", "backward"], "modes are full, forward, frozen"),
    ],
)
def test_wrong_options_are_refused_in_one_line(words, complaint, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        run.main([*words, "--json", str(tmp_path / "x.json")])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1


def test_json_is_replaced_whole_and_holds_no_nan(tmp_path):
    path = tmp_path / "x.json"
    environment.write_json(path, {"a": [math.nan, 1.5], "b": {"c": math.inf}})
    assert json.loads(path.read_text()) == {"a": [None, 1.5], "b": {"c": None}}
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.process
def test_memory_probe_measures_what_a_method_allocates(batch):
    shape = "T256-H32-V65536"  # one float32 logits matrix is 64 MiB
    naive = memory_probe.in_subprocess(memory_probe.Spec("logprobs", "naive", shape, "float32"))
    assert 64 * 2**20 < naive < 400 * 2**20


# Variants of ours

TINY = problems.Shape(tokens=16, hidden_size=16, vocab_size=96)
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU the kernels run in the interpreter")


@on_cpu
def test_a_variant_runs_the_stage_it_names_and_leaves_no_trace():
    small = problems.make_batch(TINY, problems.make_weight(TINY, CPU, FLOAT32, 0), "peaked", 1)
    given = {"backend": "triton"}
    before = type(our_engines.make_engine(small, given)[0])
    with our_engines.planned(None):
        inside = type(our_engines.make_engine(small, given)[0])
    assert inside is not before
    assert type(our_engines.make_engine(small, given)[0]) is before
    stage_one = our_engines.sweep_configs(small)["stage 1, library GEMM"]
    found = our_engines.exponentials_call(small, stage_one, TINY.tokens)(0)
    torch.testing.assert_close(
        found, accuracy.oracle("logprobs", small, torch.float64).logprobs.float(), rtol=1e-5, atol=1e-5
    )


@on_cpu
def test_the_sweep_ranks_configurations_and_refuses_wrong_ones(monkeypatch):
    truth = our_engines.exponentials_call
    shipped = []

    def call(batch, config, num_rows):
        made = truth(batch, config, num_rows)
        shipped.append(config)
        return made if len(shipped) != 2 else lambda turn: made(turn) + 1.0  # the second configuration is wrong

    monkeypatch.setattr(our_engines, "exponentials_call", call)
    found = gemm_sweep.sweep(CPU, TINY, 1, lambda name: None)
    entries = found["entries"]
    assert len(entries) == 3
    assert entries[-1]["failed"] == "wrong: log-probs off by 1 nats"
    assert entries[0]["median_ms"] <= entries[1]["median_ms"]
    assert {entry["stage"] for entry in entries[:2]} == {1, 2}
    rate = 2e-9 * 16 * 16 * 96 / entries[0]["median_ms"]
    assert entries[0]["tflops"] == pytest.approx(rate)
    assert "failed: wrong" in gemm_sweep.sweep_text(found)
