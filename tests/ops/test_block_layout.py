"""Blocks and strays of a mask against brute force."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from moduli_kernels.ops.block_layout import BlockLayout, Lists, gather_blocks, lay_out_blocks


def entries(layout: BlockLayout, lists: Lists, transposed: bool) -> list[tuple[int, int]]:
    """(row, column) of every entry that the lists hold, one by one, from their definitions."""
    found = []
    order = (layout.column_order if transposed else layout.row_order).tolist()
    side = layout.side
    starts, places, partners = lists.starts.tolist(), lists.places.tolist(), lists.partners.tolist()
    for i in range(len(starts) - 1):
        for e in range(starts[i], starts[i + 1]):
            kept = layout.kept[places[e]].t() if transposed else layout.kept[places[e]]
            for a, b in kept.nonzero().tolist():
                found.append((order[i * side + a], partners[e * side + b]))
    starts, partners = lists.stray_starts.tolist(), lists.stray_partners.tolist()
    for row in range(len(starts) - 1):
        found += [(row, partners[e]) for e in range(starts[row], starts[row + 1])]
    return [(b, a) for a, b in found] if transposed else found


@settings(max_examples=60)
@given(st.integers(1, 100), st.integers(1, 100), st.sampled_from((16, 32, 64)), st.floats(0, 1), st.booleans(),
       st.booleans(), st.one_of(st.none(), st.integers(1, 5000)), st.integers(0, 99))
def test_every_kept_entry_once(rows, columns, side, density, row_ordered, column_ordered, threshold, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < density * torch.rand(rows, 1, generator=generator)
    row_order = torch.randperm(rows, generator=generator) if row_ordered else None
    column_order = torch.randperm(columns, generator=generator) if column_ordered else None
    layout = lay_out_blocks(mask, row_order, column_order, side=side, threshold=threshold)
    want = sorted(map(tuple, mask.nonzero().tolist()))
    assert sorted(entries(layout, layout.rows, False)) == want
    assert sorted(entries(layout, layout.columns, True)) == want

    # blocks in the order: whole ones, and those alone
    r = torch.arange(rows) if row_order is None else row_order
    c = torch.arange(columns) if column_order is None else column_order
    ordered = torch.nn.functional.pad(mask[r][:, c], (0, -columns % side, 0, -rows % side))
    listed = dict(zip(zip(layout.block_rows.tolist(), layout.block_columns.tolist()), layout.kept))
    for i in range(0, ordered.shape[0], side):
        for j in range(0, ordered.shape[1], side):
            block = ordered[i:i + side, j:j + side]
            enough = block.sum() >= (side * side // 8 if threshold is None else threshold)
            assert ((i // side, j // side) in listed) == bool(enough)
            assert not enough or torch.equal(listed[i // side, j // side], block)

    # the transposed strays are the same entries
    values = torch.arange(rows * columns)[layout.strays]
    by_row, by_column = layout.rows, layout.columns
    assert torch.equal(values[by_row.stray_places.long()] % columns, by_row.stray_partners)
    assert torch.equal(values[by_column.stray_places.long()] // columns, by_column.stray_partners)
    for tensor in (*by_row, *by_column, layout.row_order, layout.column_order, layout.block_rows, layout.block_columns):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()

    groups = [(e, row) for first, end, row in layout.groups.tolist() for e in range(first, end)]
    assert groups == list(enumerate(layout.block_rows.tolist()))
    assert all(0 < (end - first) * side <= 128 for first, end, _ in layout.groups.tolist())

    weight = torch.rand(rows, columns, generator=generator)
    blocks = gather_blocks(torch.where(mask, weight, float("nan")), layout)
    padded = torch.nn.functional.pad(torch.where(mask, weight, 0)[r][:, c], (0, -columns % side, 0, -rows % side))
    for e, (i, j) in enumerate(zip(layout.block_rows.tolist(), layout.block_columns.tolist())):
        assert torch.equal(blocks[e], padded[i * side:(i + 1) * side, j * side:(j + 1) * side])


def test_errors():
    mask = torch.ones(4, 5, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"mask must be bool \(True = kept\), got torch.float32; compare it with 0."):
        lay_out_blocks(mask.float())
    with pytest.raises(ValueError, match=r"mask must have two dimensions, got shape \(4, 5, 1\)"):
        lay_out_blocks(mask[:, :, None])
    with pytest.raises(ValueError, match="side must be one of 16, 32, 64, got 8; pick one of them."):
        lay_out_blocks(mask, side=8)
    with pytest.raises(ValueError, match="threshold must be at least 1, got 0"):
        lay_out_blocks(mask, threshold=0)
    for wrong in (torch.arange(5), torch.zeros(4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"row_order must be a permutation of 0 ... 3, got shape"):
            lay_out_blocks(mask, wrong)
    with pytest.raises(ValueError, match=r"column_order must be a permutation of 0 ... 4, got shape"):
        lay_out_blocks(mask, None, torch.arange(4))
