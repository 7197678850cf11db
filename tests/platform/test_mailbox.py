"""Mailboxes between processes: order, deadlines, and processes that have ended."""

from __future__ import annotations

import multiprocessing
import os

import pytest

from qerl_rl.platform.mailbox import MailAddress, Mailbox, Outbox


def write(address: MailAddress, messages: int) -> None:
    outbox = Outbox(address)
    for number in range(messages):
        outbox.put(os.getpid(), number, -1, 2**62, -(2**62))


def writer(mailbox: Mailbox, messages: int) -> multiprocessing.Process:
    # Forked: nothing but a system call or two happens there.
    process = multiprocessing.get_context("fork").Process(target=write, args=(mailbox.address, messages))
    process.start()
    return process


def test_messages_of_several_writers_come_whole_and_in_each_ones_order() -> None:
    mailbox, count = Mailbox(), 400
    writers = [writer(mailbox, count) for _ in range(3)]
    found: dict[int, list[int]] = {}
    for _ in range(3 * count):
        process, number, *rest = mailbox.take(20.0, os.getpid())
        assert rest == [-1, 2**62, -(2**62)]
        found.setdefault(process, []).append(number)
    for process in writers:
        process.join()
    assert found == {process.pid: list(range(count)) for process in writers}


def test_a_writer_that_writes_nothing_in_time_and_one_that_has_ended() -> None:
    mailbox = Mailbox()
    with pytest.raises(TimeoutError, match=r"nothing in 0\.1 s"):
        mailbox.take(0.1, os.getpid())
    ended = writer(mailbox, 1)
    ended.join()
    # What it wrote before its end is not lost.
    assert mailbox.take(5.0, ended.pid)[1] == 0
    with pytest.raises(RuntimeError, match=f"process {ended.pid} has ended"):
        mailbox.take(60.0, ended.pid)


def test_a_mailbox_that_is_gone() -> None:
    mailbox = Mailbox()
    address = mailbox.address
    outbox = Outbox(address)
    outbox.put(0, 0, 0, 0, 0)
    del mailbox
    with pytest.raises(RuntimeError, match=f"process {os.getpid()} has closed its mailbox"):
        outbox.put(0, 0, 0, 0, 0)
    with pytest.raises(OSError, match=r"No such file|is not"):
        Outbox(address)
