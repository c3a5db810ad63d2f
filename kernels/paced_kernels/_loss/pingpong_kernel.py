"""Vocabulary projection in CuTe DSL for sm_90a: two warp groups take turns at the tensor cores.

    z = hidden W^T / temperature + bias          never leaves the registers, always float32
    E[t, v] = exp(z[t, v] - reference[t])        stored in bfloat16, 0 at the target
    sums[k, t] = sum of E over vocabulary tile k float32, before E is rounded

The mathematics and the arguments are those of `gemm_kernels.project_kernel`; the difference is when things happen. A
program has three warp groups. One thread of the first loads blocks of both operands (TMA) into a ring of `STAGES`
buffers. The other two are consumers: each owns whole tiles, every second one, and while one multiplies the other turns
its accumulators into exponentials and stores them, so the tensor cores never wait for an epilogue. Two programs form a
cluster that works on two row tiles and one vocabulary tile: each loads half of the block of the weight and hands it to
both (multicast), so that a tile of 128 x 192 reads 7/8 of what a tile of 128 x 256 reads per operation without it.

Who waits for whom:

    full[stage]      the consumer whose turn it is waits for one arrival by the loading thread, and for the bytes
    empty[stage]     the loading thread waits for one arrival by each warp of the consumer, in both programs
    TURN + consumer  a consumer may multiply once the other has issued its last product: without it, a consumer could
                     take the parity of an earlier round of the ring for its own
    STAGING + c      the warps of consumer c wait for each other around the buffer that its exponentials leave by

T = rows, H = hidden size, V = rows of the weight (of this rank's shard), P = vocabulary tiles.
"""

# Kernels are written in CuTe's language, which type checkers read as Python, from a package that may be absent.
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportInvalidTypeForm=false

from typing import Any

import cutlass
import cutlass.utils.hopper_helpers as hopper
from cutlass import cute
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

from . import pingpong_plan as plan
from .pingpong_epilogue import exponentiate, store_tile, tensor_cores


class ProjectKernel:
    """One variant of the projection; the names of the options are those of `project_kernel`."""

    def __init__(self, options: plan.Options) -> None:
        self.options = options

    @cute.jit
    def __call__(
        self,
        hidden_ptr: cute.Pointer,  # [T, H] bf16
        weight_ptr: cute.Pointer,  # [V, H] bf16
        out_ptr: cute.Pointer,  # [T, stride_out] bf16, E; not touched by SUMS
        bias_ptr: cute.Pointer,  # [V], and finite numbers to the end of the last tile
        token_ptr: cute.Pointer,  # [T], ids of the whole vocabulary
        reference_ptr: cute.Pointer,  # [T] f32
        gate_ptr: cute.Pointer,  # [1 + number of row tiles] i32
        sums_ptr: cute.Pointer,  # [P, T] f32
        weighted_ptr: cute.Pointer,  # [P, T] f32, of E (z - reference)
        maxima_ptr: cute.Pointer,  # [P, T] f32, only SUMS
        num_rows: cutlass.Int32,
        vocab_size: cutlass.Int32,
        hidden_size: cutlass.Int32,
        vocab_start: cutlass.Int64,
        stride_hidden: cutlass.Int64,
        stride_weight: cutlass.Int64,
        stride_out: cutlass.Int64,
        inv_temperature: cutlass.Float32,
        num_clusters: cutlass.Int32,
        stream: Any,
    ) -> None:
        """Describe the operands to the TMA unit and launch one program a multiprocessor."""
        bf16 = cutlass.BFloat16
        k_major = LayoutEnum.ROW_MAJOR
        tile = (plan.BLOCK_T, plan.BLOCK_V, plan.BLOCK_H)
        layout_a = hopper.make_smem_layout_a(k_major, tile, bf16, plan.STAGES)
        layout_b = hopper.make_smem_layout_b(k_major, tile, bf16, plan.STAGES)
        layout_out = hopper.make_smem_layout_epi(bf16, k_major, plan.PIECE, plan.CONSUMERS)
        hidden = _rows(hidden_ptr, num_rows, hidden_size, stride_hidden)
        weight = _rows(weight_ptr, vocab_size, hidden_size, stride_weight)
        out = hidden  # described to the TMA unit, not touched
        if cutlass.const_expr(self.options.stores):
            out = _rows(out_ptr, num_rows, vocab_size, stride_out)
        load_a, hidden_tma = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(),
            hidden,
            cute.slice_(layout_a, (None, None, 0)),
            (plan.BLOCK_T, plan.BLOCK_H),
        )
        load_b, weight_tma = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SMulticastOp(),
            weight,
            cute.slice_(layout_b, (None, None, 0)),
            (plan.BLOCK_V, plan.BLOCK_H),
            num_multicast=plan.CLUSTER,
        )
        store, out_tma = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileS2GOp(), out, cute.slice_(layout_out, (None, None, 0)), plan.PIECE
        )
        products, piece_products = tensor_cores((64, plan.BLOCK_V)), tensor_cores(plan.PIECE)

        @cute.struct
        class Storage:
            full: cute.struct.MemRange[cutlass.Int64, plan.STAGES]
            empty: cute.struct.MemRange[cutlass.Int64, plan.STAGES]
            a: cute.struct.Align[cute.struct.MemRange[bf16, cute.cosize(layout_a)], 1024]
            b: cute.struct.Align[cute.struct.MemRange[bf16, cute.cosize(layout_b)], 1024]
            out: cute.struct.Align[cute.struct.MemRange[bf16, cute.cosize(layout_out)], 1024]

        self.storage = Storage
        self.project(
            load_a,
            hidden_tma,
            load_b,
            weight_tma,
            store,
            out_tma,
            products,
            piece_products,
            layout_a,
            layout_b,
            layout_out,
            (bias_ptr, token_ptr, reference_ptr, gate_ptr, sums_ptr, weighted_ptr, maxima_ptr),
            num_rows,
            vocab_size,
            hidden_size,
            vocab_start,
            inv_temperature,
        ).launch(
            grid=(num_clusters * plan.CLUSTER, 1, 1),
            block=(plan.THREADS, 1, 1),
            cluster=(plan.CLUSTER, 1, 1),
            min_blocks_per_mp=1,
            stream=stream,
        )

    @cute.kernel
    def project(
        self,
        load_a: cute.CopyAtom,
        hidden: cute.Tensor,
        load_b: cute.CopyAtom,
        weight: cute.Tensor,
        store: cute.CopyAtom,
        out: cute.Tensor,
        products: cute.TiledMma,
        piece_products: cute.TiledMma,
        layout_a: cute.ComposedLayout,
        layout_b: cute.ComposedLayout,
        layout_out: cute.ComposedLayout,
        pointers: tuple[cute.Pointer, ...],
        num_rows: cutlass.Int32,
        vocab_size: cutlass.Int32,
        hidden_size: cutlass.Int32,
        vocab_start: cutlass.Int64,
        inv_temperature: cutlass.Float32,
    ) -> None:
        """A cluster works on cluster tiles `cluster`, `cluster + clusters`, ...; consumers take them in turn."""
        thread, _, _ = cute.arch.thread_idx()
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
        storage = SmemAllocator().allocate(self.storage)
        full, empty = storage.full.data_ptr(), storage.empty.data_ptr()
        if warp_index == 0:
            with cute.arch.elect_one():
                for stage in cutlass.range_constexpr(plan.STAGES):
                    cute.arch.mbarrier_init(full + stage, plan.FULL_ARRIVALS)
                    cute.arch.mbarrier_init(empty + stage, plan.EMPTY_ARRIVALS)
        cute.arch.mbarrier_init_fence()
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()

        s_a = storage.a.get_tensor(layout_a.outer, swizzle=layout_a.inner)
        s_b = storage.b.get_tensor(layout_b.outer, swizzle=layout_b.inner)
        s_out = storage.out.get_tensor(layout_out.outer, swizzle=layout_out.inner)
        block, _, _ = cute.arch.block_idx()
        blocks, _, _ = cute.arch.grid_dim()
        cluster, num_clusters = block // plan.CLUSTER, blocks // plan.CLUSTER
        num_row_tiles = cute.ceil_div(num_rows, plan.BLOCK_T)
        row_clusters = cute.ceil_div(num_row_tiles, plan.CLUSTER)
        vocab_tiles = cute.ceil_div(vocab_size, plan.BLOCK_V)
        num_tiles = row_clusters * vocab_tiles
        num_steps = cute.ceil_div(hidden_size, plan.BLOCK_H)
        gate = cute.make_tensor(pointers[3], cute.make_layout(1 + num_row_tiles))
        if cutlass.const_expr(self.options.gated):
            num_tiles = cutlass.select_(gate[0] != 0, num_tiles, cutlass.Int32(0))

        group = warp_index // plan.WARPS_PER_GROUP
        if group == 0:
            cute.arch.setmaxregister_decrease(plan.LOADER_REGISTERS)
            if warp_index == 0:
                self._load(
                    (load_a, hidden, s_a, load_b, weight, s_b),
                    (full, empty),
                    (cluster, num_clusters, rank),
                    (num_tiles, row_clusters, vocab_tiles, num_steps),
                    gate,
                    num_row_tiles,
                )
        else:
            cute.arch.setmaxregister_increase(plan.CONSUMER_REGISTERS)
            self._consume(
                (products, piece_products, store, out, s_a, s_b, s_out),
                (full, empty),
                (cluster, num_clusters, rank),
                (num_tiles, row_clusters, vocab_tiles, num_steps),
                gate,
                num_row_tiles,
                pointers,
                (num_rows, vocab_size, vocab_start, inv_temperature),
                group - 1,
                thread % plan.GROUP_THREADS,
            )
        # Neither program of a cluster may end while the other still arrives at its barriers or writes to its memory.
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()

    @cute.jit
    def _is_wanted(self, gate: cute.Tensor, row_cluster: cutlass.Int32, num_row_tiles: cutlass.Int32) -> Any:
        """Whether a cluster tile is to be computed: always, or with `gated` if either of its row tiles is flagged."""
        wanted = cutlass.Int32(1)
        if cutlass.const_expr(self.options.gated):
            first = row_cluster * plan.CLUSTER
            second = cutlass.min(first + 1, num_row_tiles - 1)
            wanted = gate[1 + first] | gate[1 + second]
        return wanted != 0

    @cute.jit
    def _load(
        self, operands: Any, barriers: Any, place: Any, sizes: Any, gate: cute.Tensor, num_row_tiles: cutlass.Int32
    ) -> None:
        """Fill the ring of buffers, in the order in which the consumers empty it."""
        load_a, hidden, s_a, load_b, weight, s_b = operands
        full, empty = barriers
        cluster, num_clusters, rank = place
        num_tiles, row_clusters, vocab_tiles, num_steps = sizes
        blocks_a = cute.local_tile(hidden, (plan.BLOCK_T, plan.BLOCK_H), (None, None))
        blocks_b = cute.local_tile(weight, (plan.BLOCK_V, plan.BLOCK_H), (None, None))
        to_a, from_a = cpasync.tma_partition(
            load_a, 0, cute.make_layout(1), cute.group_modes(s_a, 0, 2), cute.group_modes(blocks_a, 0, 2)
        )
        to_b, from_b = cpasync.tma_partition(
            load_b, rank, cute.make_layout(plan.CLUSTER), cute.group_modes(s_b, 0, 2), cute.group_modes(blocks_b, 0, 2)
        )
        everyone = cutlass.Int16((1 << plan.CLUSTER) - 1)
        stage, phase = cutlass.Int32(0), cutlass.Int32(0)
        for i_tile in range(cluster, num_tiles, num_clusters):
            row_cluster, i_vocab = _position(i_tile, row_clusters, vocab_tiles)
            i_row = row_cluster * plan.CLUSTER + rank
            if self._is_wanted(gate, row_cluster, num_row_tiles):
                for step in range(num_steps):
                    # A fresh barrier counts as one whose previous phase is over, so the first round does not wait.
                    cute.arch.mbarrier_wait(empty + stage, phase ^ 1)
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive_and_expect_tx(full + stage, plan.STAGE_BYTES)
                    cute.copy(load_a, from_a[None, i_row, step], to_a[None, stage], tma_bar_ptr=full + stage)
                    cute.copy(
                        load_b,
                        from_b[None, i_vocab, step],
                        to_b[None, stage],
                        tma_bar_ptr=full + stage,
                        mcast_mask=everyone,
                    )
                    stage, phase = _next(stage, phase)

    @cute.jit
    def _consume(
        self,
        operands: Any,
        barriers: Any,
        place: Any,
        sizes: Any,
        gate: cute.Tensor,
        num_row_tiles: cutlass.Int32,
        pointers: Any,
        numbers: Any,
        consumer: cutlass.Int32,
        thread: cutlass.Int32,  # in the warp group
    ) -> None:
        """Multiply and finish every second wanted tile."""
        products, piece_products, store, out, s_a, s_b, s_out = operands
        cluster, num_clusters, rank = place
        num_tiles, row_clusters, vocab_tiles, num_steps = sizes
        slice_mma = products.get_slice(thread)
        r_a = products.make_fragment_A(slice_mma.partition_A(s_a))
        r_b = products.make_fragment_B(slice_mma.partition_B(s_b))
        logits = cute.make_rmem_tensor(products.partition_shape_C((plan.BLOCK_T, plan.BLOCK_V)), cutlass.Float32)
        # [row, column] of each accumulator of this thread within the tile
        places = slice_mma.partition_C(cute.make_identity_tensor((plan.BLOCK_T, plan.BLOCK_V)))
        turn = cutlass.Int32(0)
        for i_tile in range(cluster, num_tiles, num_clusters):
            row_cluster, i_vocab = _position(i_tile, row_clusters, vocab_tiles)
            if self._is_wanted(gate, row_cluster, num_row_tiles):
                if turn % plan.CONSUMERS == consumer:
                    if turn > 0:
                        _turn_wait(consumer)
                    self._multiply(products, r_a, r_b, logits, barriers, turn * num_steps, num_steps, consumer)
                    row_start = (row_cluster * plan.CLUSTER + rank) * plan.BLOCK_T
                    column_start = i_vocab * plan.BLOCK_V
                    tile = (row_start, column_start, i_vocab)
                    exponentiate(self.options, logits, places, tile, pointers, numbers, thread)
                    if cutlass.const_expr(self.options.stores):
                        staged = (piece_products, store, out, s_out[None, None, consumer])
                        store_tile(logits, staged, tile, numbers, plan.STAGING + consumer, thread)
                turn += 1
        # The last tile has left a permission to multiply that nobody took.
        if (turn > 0) & (turn % plan.CONSUMERS == consumer):
            _turn_wait(consumer)
        if cutlass.const_expr(self.options.stores):
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def _multiply(
        self,
        products: cute.TiledMma,
        r_a: cute.Tensor,
        r_b: cute.Tensor,
        logits: cute.Tensor,
        barriers: Any,
        first: cutlass.Int32,  # blocks that all tiles before this one took from the ring
        num_steps: cutlass.Int32,
        consumer: cutlass.Int32,
    ) -> None:
        """Sum the products of a tile, one block of H in flight behind the one being issued."""
        full, empty = barriers
        stage = first % plan.STAGES
        phase = (first // plan.STAGES) % 2
        cute.arch.mbarrier_wait(full + stage, phase)
        warpgroup.fence()
        products.set(warpgroup.Field.ACCUMULATE, False)
        for part in cutlass.range_constexpr(plan.BLOCK_H // 16):
            cute.gemm(products, logits, r_a[None, None, part, stage], r_b[None, None, part, stage], logits)
            products.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()
        previous = stage
        stage, phase = _next(stage, phase)
        for _ in range(1, num_steps):
            cute.arch.mbarrier_wait(full + stage, phase)
            warpgroup.fence()
            for part in cutlass.range_constexpr(plan.BLOCK_H // 16):
                cute.gemm(products, logits, r_a[None, None, part, stage], r_b[None, None, part, stage], logits)
            warpgroup.commit_group()
            warpgroup.wait_group(1)
            _release(empty, previous)
            previous = stage
            stage, phase = _next(stage, phase)
        # Everything is issued and waited for except the last products: the other consumer's can queue behind them.
        cute.arch.barrier_arrive(
            barrier_id=plan.TURN + plan.CONSUMERS - 1 - consumer, number_of_threads=plan.CONSUMERS * plan.GROUP_THREADS
        )
        warpgroup.wait_group(0)
        _release(empty, previous)


@cute.jit
def _position(i_tile: cutlass.Int32, row_clusters: cutlass.Int32, vocab_tiles: cutlass.Int32) -> Any:
    """`plan.tile_position` in the kernel's language."""
    tiles_per_group = row_clusters * plan.GROUP_V
    i_group = i_tile // tiles_per_group
    first = i_group * plan.GROUP_V
    width = cutlass.min(vocab_tiles - first, plan.GROUP_V)
    within = i_tile - i_group * tiles_per_group
    return within // width, first + within % width


@cute.jit
def _next(stage: cutlass.Int32, phase: cutlass.Int32) -> Any:
    """The next buffer of the ring, and the parity of its round."""
    stage = stage + 1
    if stage == plan.STAGES:
        stage = cutlass.Int32(0)
        phase = phase ^ 1
    return stage, phase


@cute.jit
def _release(empty: cute.Pointer, stage: cutlass.Int32) -> None:
    """Tell the loading threads of both programs that this warp has read a buffer."""
    lane = cute.arch.lane_idx()
    if lane < plan.CLUSTER:
        cute.arch.mbarrier_arrive(empty + stage, lane)


@cute.jit
def _turn_wait(consumer: cutlass.Int32) -> None:
    """Wait until the other consumer has issued its last product."""
    cute.arch.barrier(barrier_id=plan.TURN + consumer, number_of_threads=plan.CONSUMERS * plan.GROUP_THREADS)


@cute.jit
def _rows(pointer: cute.Pointer, num_rows: cutlass.Int32, size: cutlass.Int32, stride: cutlass.Int64) -> cute.Tensor:
    """[num_rows, size] with rows that start at multiples of 16 bytes."""
    return cute.make_tensor(pointer, cute.make_layout((num_rows, size), stride=(cute.assume(stride, divby=8), 1)))
