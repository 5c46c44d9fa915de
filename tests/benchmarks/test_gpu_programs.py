"""Programs compiled for H100 have the FLOPs, bytes and roofline of their formulas."""

import itertools

import numpy as np
import pytest

from benchmarks import compiled, gpu, roofline
from benchmarks.replica_groups import replica_groups
from tests.support import gpu_programs
from tests.support.gpu_programs import BF16, FLOPS, HOSTS, NVLINK, SENT, N

H100 = gpu.GPUS["h100"]


@pytest.mark.parametrize("name", ["triton", "cublas"])
def test_products_count_by_the_dtype_of_their_rate(name):
    text = gpu_programs.committed_text(name)
    least = roofline.roofline(text, H100, HOSTS)
    assert least.flops == FLOPS
    assert compiled.program_cost(text).flops == sum(FLOPS.values())
    seconds = FLOPS["bf16"] / 989e12 + FLOPS["tf32"] / 494e12 + FLOPS["f32"] / 67e12
    assert least.product_seconds == pytest.approx(seconds)
    assert ("__cublas" in text) == (name == "cublas")


def test_collectives_count_on_the_link_that_they_need():
    text = gpu_programs.committed_text("collectives")
    assert compiled.program_cost(text).sent == SENT
    least = roofline.roofline(text, H100, HOSTS)
    network = sum(SENT.values()) - NVLINK
    assert (least.nvlink_bytes, least.network_bytes) == (NVLINK, network)
    assert least.nvlink_seconds == pytest.approx(NVLINK / 450e9)
    assert least.network_seconds == pytest.approx(network / 50e9)


def test_all_links_of_one_host_are_nvlink():
    least = roofline.roofline(gpu_programs.committed_text("collectives"), H100, [0] * 4)
    assert (least.nvlink_bytes, least.network_bytes) == (sum(SENT.values()), 0)


def test_asynchronous_sum_counts_once():
    """On GPU its result has the operands beside the sums."""
    text = gpu_programs.committed_text("overlapped")
    assert "all-reduce-start(" in text
    assert compiled.program_cost(text).sent == {"all-reduce": N**2 * BF16}


def test_product_without_a_rate_raises():
    text = gpu_programs.committed_text("triton").replace("f32[", "f64[")
    with pytest.raises(ValueError, match=r"H100 80GB HBM3 has rates for .* products of f64"):
        roofline.roofline(text, H100, HOSTS)


@pytest.mark.parametrize("axes", list(itertools.permutations("abc", 2)))
def test_groups_along_axes_of_a_mesh(axes):
    devices = np.arange(24).reshape(2, 3, 4)
    others = next(i for i, name in enumerate("abc") if name not in axes)
    order = [others, *("abc".index(name) for name in axes)]
    expected = devices.transpose(order).reshape(devices.shape[others], -1).tolist()
    grouped = ",".join(f"'{name}'" for name in axes)
    text = f"replica_groups=mesh['a'=2,'b'=3,'c'=4] {{{grouped}}}, dimensions={{0}}"
    assert replica_groups(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}, to_apply=%sum", [[0, 2], [1, 3]]),
        ("replica_groups={{0},{1,2}}", [[0], [1, 2]]),
        ("replica_groups=[2,3]<=[6]", [[0, 1, 2], [3, 4, 5]]),
        ("replica_groups=[3,2]<=[2,3]T(1,0)", [[0, 3], [1, 4], [2, 5]]),
        ("replica_groups=mesh['a'=4], device_ids=([3,1,2,0]) {'a'}", [[3, 1, 2, 0]]),
        ("replica_groups=mesh['a'=4], device_ids=([4]<=[2,2]T(1,0)) {'a'}", [[0, 2, 1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,2},{2,0}}", [[0, 2], [2, 0]]),
        ("replica_groups={}, to_apply=%sum", []),
        ("channel_id=1, to_apply=%sum", []),
    ],
)
def test_groups_are_read_in_every_form(text, expected):
    assert replica_groups(f"channel_id=1, {text}") == expected


def test_unknown_form_of_groups_raises():
    with pytest.raises(ValueError, match=r"cannot read 'replica_groups=@new'"):
        replica_groups("channel_id=1, replica_groups=@new")


@pytest.mark.parametrize("topology", ["h100", "h100:8", "h100:0x8", "h100:8x8x8", "h100:"])
def test_topology_without_two_sizes_raises(topology):
    with pytest.raises(ValueError, match=rf"{topology}: expected .* such as h100:8x8"):
        gpu.cluster(topology)


def test_topology_of_other_devices_is_no_cluster():
    assert gpu.cluster("v5p:2x2x1") is None
    assert gpu.cluster("h200:2x4") == gpu.Cluster(gpu.GPUS["h200"], 2, 4)
