"""Names of machines, and the devices that stand for them."""

import pytest

from tljax.runtime.errors import RequestError
from tljax.runtime.machines import CHIPS, parse_machine, require_compiler


@pytest.mark.parametrize(
    ("name", "chips", "hosts", "shape"),
    [
        ("v5e-1", 1, 1, (1, 1)),
        ("v5e-8", 8, 1, (2, 4)),
        ("v5litepod-16", 16, 4, (4, 4)),
        ("V5E-256", 256, 64, (16, 16)),
        ("v6e-8", 8, 1, (2, 4)),
        ("v4-8", 4, 1, (2, 2, 1)),  # of cores, two a chip
        ("v4-32", 16, 4, (2, 2, 4)),
        ("v5p-128", 64, 16, (4, 4, 4)),
        ("2xv5e-16", 32, 8, (4, 4)),
        ("3xv5e-8", 24, 3, (2, 4)),
        ("h100-8", 8, 1, (8,)),
        ("a100", 1, 1, (1,)),
    ],
)
def test_a_machine_has_the_chips_and_hosts_of_its_name(name, chips, hosts, shape):
    machine = parse_machine(name)
    assert (machine.chips, machine.hosts, machine.shape) == (chips, hosts, shape)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("v7-8", "--on v7-8: no such machine"),
        ("", "--on : no such machine"),
        ("v5e-3", "choose from v5e-1, v5e-4, v5e-8, v5e-16"),
        ("v4-4", "choose from v4-8, v4-16, v4-32"),
        ("v4-9", "no such number of chips"),
        ("h100-16", "choose from h100-1, h100-2"),
        ("2xh100-8", "only TPUs come in slices"),
        ("0xv5e-8", "no such machine"),
    ],
)
def test_a_machine_that_does_not_exist_is_refused_with_those_that_do(name, line):
    with pytest.raises(RequestError) as error:
        parse_machine(name)
    assert line in str(error.value)


def test_programs_get_the_memory_that_jax_gives_them():
    assert parse_machine("v5e-8").usable_memory == int(15.75 * 2**30)
    assert parse_machine("h100-8").usable_memory == CHIPS["h100"].memory * 3 // 4


def test_a_missing_compiler_is_named_with_the_extra_that_installs_it(monkeypatch):
    monkeypatch.setattr("tljax.runtime.machines.find_spec", lambda _: None)
    for chip in CHIPS.values():
        with pytest.raises(RequestError, match=r'pip install "tljax\[rehearse\]"'):
            require_compiler(chip)
