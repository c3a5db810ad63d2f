"""Counts of a disassembly, the arithmetic of predicted rates, and what was measured beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import run
from benchmarks.loss import cycle_model, disassembly
from benchmarks.loss.problems import Shape

FLAT = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/                   ISETP.NE.AND P0, PT, R1, RZ, PT ;
        /*0020*/               @P0 BRA `(.L_x_2) ;
        /*0030*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0040*/                   MUFU.RCP R2, R2 ;
.L_x_2:
        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR10], R3 ;
        /*0060*/              @!P4 BRA `(.L_x_6) ;
.L_x_7:
        /*0070*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0080*/               @P1 BRA `(.L_x_3) ;
        /*0090*/                   LDG.E R3, desc[UR6][R4.64] ;
        /*00a0*/               @P2 BRA `(.L_x_4) ;
        /*00b0*/                   FFMA R5, R24, UR4, -R3 ;
        /*00c0*/                   MUFU.EX2 R5, R5 ;
        /*00d0*/                   BRA.DIV UR4, `(.L_x_8) ;
        /*00e0*/                   F2FP.BF16.F32.PACK_AB R7, R5, R6 ;
        /*00f0*/               @P0 STG.E desc[UR6][R6.64], R5 ;
        /*0100*/                   BRA `(.L_x_5) ;
.L_x_4:
        /*0110*/                   FFMA R5, R24, UR4, -R3 ;
        /*0120*/                   ISETP.NE.U32.AND P3, PT, R8, R9, PT ;
        /*0130*/                   FSEL R5, R5, -INF , P3 ;
        /*0140*/                   LOP3.LUT R9, R9, 0x1, RZ, 0xc0, !PT ;
        /*0148*/                   MUFU.EX2 R5, R5 ;
        /*0150*/                   F2FP.BF16.F32.PACK_AB R7, R5, R6 ;
        /*0160*/               @P0 STG.E desc[UR6][R6.64], R5 ;
.L_x_5:
        /*0170*/                   MOV R24, RZ ;
.L_x_3:
        /*0180*/              @!P0 BRA `(.L_x_1) ;
        /*0190*/                   EXIT ;
.L_x_6:
        /*01a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR10], R3 ;
        /*01b0*/              @!P4 BRA `(.L_x_6) ;
        /*01c0*/                   BRA `(.L_x_7) ;
.L_x_8:
        /*01d0*/                   MUFU.EX2 R5, R5 ;
        /*01e0*/                   EXIT ;
"""
NESTED = """
.L_x_1:
        /*0000*/                   CS2R R24, SRZ ;
.L_x_2:
        /*0010*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   FMUL R24, R24, UR4 ;
        /*0040*/                   MUFU.EX2 R24, R24 ;
        /*0050*/                   UTMASTG.2D [UR8], [UR6] ;
        /*0060*/              @!P1 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
"""


def test_one_loop_over_all_steps_is_told_apart_from_its_epilogue() -> None:
    found = disassembly.tile_counts(FLAT)
    # Counted by hand: instructions, ALU, MUFU, then FADD, FFMA and FMUL.
    assert found == {
        "step": (7, 1, 0, (0, 0, 0)),  # ISETP, BRA; SYNCS, BRA; HGMMA, BRA; the last BRA
        "epilogue": (7, 1, 1, (0, 1, 0)),  # LDG, BRA; FFMA, EX2, BRA.DIV, F2FP, STG
        "masked": (9, 4, 1, (0, 1, 0)),  # LDG, BRA; FFMA, ISETP, FSEL, LOP3, EX2, F2FP, STG
        "begin": (5, 2, 1, (0, 0, 0)),  # IADD3, RCP; BRA; MOV; the last BRA
    }


def test_a_loop_for_each_tile_has_one_way_through_its_epilogue() -> None:
    found = disassembly.tile_counts(NESTED)
    assert found["step"][0] == 2
    assert found["epilogue"] == found["masked"] == (3, 0, 1, (0, 0, 1))
    assert found["begin"][0] == 2


def kernel(instructions: int, alu: int, masked_alu: int, *, is_flat: bool) -> cycle_model.Kernel:
    counts = {"instructions": instructions, "alu": alu, "special": 128}
    tile: dict[str, dict[str, Any]] = {"epilogue": counts, "masked": {**counts, "alu": masked_alu}}
    tile["begin"] = {**counts, "instructions": instructions // 4, "special": 0}
    return cycle_model.Kernel(128, 256, 64, is_flat, 8, tile)


def test_cycles_of_a_tile() -> None:
    chip, shape = cycle_model.Chip(), Shape(tokens=8192, hidden_size=896, vocab_size=151936)
    assert chip.clock == pytest.approx(1.476e9, rel=1e-3)
    # 14 steps of 128 x 256 x 64 x 2 / 4096 = 1024 cycles at .88; ALU: 2 warps of a scheduler, 2 cycles each.
    plain = kernel(1717, 1063, 1063, is_flat=False)
    assert plain.busy("epilogue", chip) == 4 * 1063
    assert plain.cycles(shape, chip) == pytest.approx(14 * 1024 / 0.88 + 1200 + 4252 + 1100)
    # 64 x 594 tiles on 132 multiprocessors are 288 each.
    assert plain.milliseconds(shape, chip) == pytest.approx(288 * 22843 / 1.476e6, rel=1e-3)
    # Exponentials are what keeps the epilogue without masks: 2 warps, 8 cycles each. Of 1188 pieces one is the edge,
    # and 128 targets fall into a tenth of the rest; the next tile begins while its loads go on.
    flat = kernel(100, 84, 700, is_flat=True)
    share = 1 - (1187 / 1188) ** 128 + 1 / 1188
    wanted = 14 * 1024 / 0.88 + 1200 + 2048 + share * (2800 - 2048) + 2 * 168
    assert flat.cycles(shape, chip) == pytest.approx(wanted)


def test_a_pass_over_several_chunks() -> None:
    chip, shipped = cycle_model.Chip(), kernel(700, 84, 700, is_flat=True)
    one, two = (cycle_model.predict(Shape.parse(f"T{n}-H4096-V151936"), shipped, chip) for n in (8192, 16384))
    for part in ("projection", "dhidden", "dweight"):
        assert two[part] == pytest.approx(2 * one[part])
    # The second chunk reads and writes the float32 sum: 8 bytes an element at 3 TB/s; both round it once.
    assert two["other"] - one["other"] == pytest.approx(0.3 + 8e-9 * 151936 * 4096 / 3)
    assert one["total"] == pytest.approx(sum(one[part] for part in ("projection", "dhidden", "dweight", "other")))
    assert one["tflops"] == pytest.approx(1e-9 * 6 * 8192 * 4096 * 151936 / one["total"])


def write(path: Path, value: dict[str, Any]) -> str:
    path.write_text(json.dumps(value))
    return str(path)


@pytest.fixture
def compiled(tmp_path: Path) -> str:
    rows = []
    for name, is_flat in (("128x256x64 TMA flat", True), ("128x256x64 TMA plain", False)):
        tile = kernel(741, 115, 627, is_flat=is_flat).tile
        for options in ("exponentials", "exponentials, entropy, bias"):
            row = {"kernel": "project_kernel", "variant": f"{name}: {options}", "num_warps": 8, "tile": tile}
            rows.append(row)
    return write(tmp_path / "compile.json", {"rows": rows})


def test_the_case_shows_measured_rates_of_a_gpu_alone(
    compiled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swept = [{"stage": 2, "tflops": 611.2}, {"stage": 2, "tflops": 587.0}, {"stage": 1, "tflops": 700.0}]
    sweep = {"shapes": [{"shape": "T8192-H896-V151936", "entries": swept}], "device": {"type": "cuda"}}
    modes = {"full": {"common_tflops": 543.2}}
    cell = {"name": "T16384-H4096-V151936", "inputs": "peaked", "rows": [{"name": "ours", "modes": modes}]}
    losses = {"cells": [cell], "device": {"type": "cuda"}}
    words = ["cycle_model", "--compiled", compiled, "--json", str(tmp_path / "result.json")]
    words += ["--projections", write(tmp_path / "sweep.json", sweep)]
    run.main([*words, "--losses", write(tmp_path / "losses.json", losses)])
    shown = capsys.readouterr().out.splitlines()
    assert ["611" in line for line in shown if "T8192-H896-" in line] == [True]
    assert ["543" in line for line in shown if "T16384-H4096-" in line] == [True]
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["rows"]) == 6
    assert all(row["predicted"]["projection_tflops"] > row["plain_tflops"] for row in result["rows"])
    on_cpu = write(tmp_path / "cpu.json", {**losses, "device": {"type": "cpu"}})
    run.main([*words, "--losses", on_cpu])
    assert "T16384" not in capsys.readouterr().out


def test_a_table_without_instructions_and_a_shape_that_is_none_are_named(
    compiled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = write(tmp_path / "empty.json", {"rows": []})
    for words, told in (
        (["--compiled", empty], "has no instructions of a tile on sm_90: write it with"),
        (["--compiled", compiled, "--shapes", "T8192"], "shape 'T8192': write it like T16384-H4096-V151936"),
    ):
        with pytest.raises(SystemExit) as status:
            run.main(["cycle_model", *words, "--json", str(tmp_path / "result.json")])
        assert status.value.code == 2
        assert told in capsys.readouterr().err
