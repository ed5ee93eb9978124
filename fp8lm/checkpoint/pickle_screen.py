"""Whether a pickle can be read in time and memory that its size bounds, before it is read.

An unpickler that refuses foreign names runs no code, but a few bytes can still hang or crash it: a
tuple of tuples, shared or deep, as the key of a dict is hashed without end, and the number of a
memo makes room for billions. So only the operations that a checkpoint's metadata consists of are
let through, and only strings and objects as keys.
"""

from __future__ import annotations

import pickle


def _codes(*operations: bytes) -> frozenset[int]:
    return frozenset(operation[0] for operation in operations)


# What an operation does to the stack, and how many bytes follow it.
_STOP, _MARK, _MEMOIZE = pickle.STOP[0], pickle.MARK[0], pickle.MEMOIZE[0]
_PUSHES_VALUE = {
    **dict.fromkeys(_codes(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE), 0),
    **dict.fromkeys(_codes(pickle.EMPTY_TUPLE, pickle.EMPTY_LIST, pickle.EMPTY_DICT), 0),
    **{pickle.BININT[0]: 4, pickle.BININT1[0]: 1, pickle.BININT2[0]: 2},
}
_TUPLES = {pickle.TUPLE1[0]: 1, pickle.TUPLE2[0]: 2, pickle.TUPLE3[0]: 3}
_MAKES_OBJECT = _codes(pickle.REDUCE, pickle.NEWOBJ, pickle.STACK_GLOBAL)  # of two
_GETS = {pickle.BINGET[0]: 1, pickle.LONG_BINGET[0]: 4}
_STRINGS = {pickle.SHORT_BINUNICODE[0]: 1, pickle.BINUNICODE[0]: 4}
_POPS_ONE = _codes(pickle.APPEND, pickle.BUILD)
_TUPLE, _SETITEMS, _SETITEM = pickle.TUPLE[0], pickle.SETITEMS[0], pickle.SETITEM[0]
_TAKES_MARKED = _codes(pickle.TUPLE, pickle.SETITEMS, pickle.APPENDS)
_LONG1 = pickle.LONG1[0]
_SKIPS = {pickle.PROTO[0]: 1, pickle.FRAME[0]: 8}


def screen(data: bytes) -> None:
    """Raise ValueError for operations, or IndexError for an order of them, that are never written.

    Follows what lies on the unpickler's stack: of each value only whether it may be a key.
    """
    stack: list[bool] = []
    memo: list[bool] = []
    marks: list[int] = []
    at = 0
    while (code := data[at]) != _STOP:  # the most frequent first: there may be a hundred million
        at += 1
        if code == _MEMOIZE:
            memo.append(stack[-1])
        elif code in _GETS:
            width = _GETS[code]
            stack.append(memo[int.from_bytes(data[at : at + width], "little")])
            at += width
        elif code in _PUSHES_VALUE:
            stack.append(False)
            at += _PUSHES_VALUE[code]
        elif code in _MAKES_OBJECT:
            stack.pop()
            stack[-1] = True
        elif code in _TUPLES:
            del stack[-_TUPLES[code] :]
            stack.append(False)
        elif code == _MARK:
            marks.append(len(stack))
        elif code in _POPS_ONE:
            stack.pop()
        elif code in _TAKES_MARKED:
            _take_marked(code, stack, marks.pop())
        elif code == _SETITEM:
            _check_keys(stack[-2:])
            del stack[-2:]
        else:
            at = _pass(code, data, at, stack)


def _take_marked(code: int, stack: list[bool], mark: int) -> None:
    if code == _SETITEMS:
        _check_keys(stack[mark:])
    del stack[mark:]
    if code == _TUPLE:
        stack.append(False)


def _check_keys(items: list[bool]) -> None:
    if not all(items[::2]):
        raise ValueError("a key is neither a string nor an object")


def _pass(code: int, data: bytes, at: int, stack: list[bool]) -> int:
    """Follow an operation that is rare, or whose length is in it; where the next one is."""
    if code in _SKIPS:
        return at + _SKIPS[code]
    if code != _LONG1 and code not in _STRINGS:
        raise ValueError(f"it holds the operation {code:#x}, which no checkpoint contains")
    width = _STRINGS.get(code, 1)
    stack.append(code != _LONG1)
    return at + width + int.from_bytes(data[at : at + width], "little")
