"""Programs as people write them for practice sites, each with its input and its output."""

from __future__ import annotations

HONEST: list[tuple[str, str, str]] = [
    ("print(input()[::-1])", "abc", "cba"),
    ("import sys\nprint(sum(map(int, sys.stdin.read().split())))", "1 2 3\n4", "10"),
    ("import sys\nfor line in sys.stdin: print(line.strip().upper())", "a\nb\n", "A\nB"),
    ("import sys\ndata = sys.stdin.buffer.read().split()\nprint(len(data))", "x " * 50000, "50000"),
    ("import os\nprint(len(os.read(0, 1000)))", "12345", "5"),
    ("print(sum(int(x) for x in open(0)))", "1\n2\n", "3"),
    ("import io, os\ninput = io.BytesIO(os.read(0, 100)).readline\nprint(int(input()) + 1)", "41\n", "42"),
    (
        "import sys\nsys.setrecursionlimit(10**6)\ndef f(n): return 0 if n == 0 else 1 + f(n - 1)\nprint(f(20000))",
        "",
        "20000",
    ),
    (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 27)\n"
        "def f(n): return 0 if n == 0 else 1 + f(n - 1)\ndef main(): print(f(50000))\n"
        "t = threading.Thread(target=main)\nt.start()\nt.join()",
        "",
        "50000",
    ),
    ("print(pow(3, 10**5) % 10**9, len(str(2**10000)))", "", "522000001 3011"),
    (
        "import math\nprint(math.gcd(12, 18), math.comb(50, 25), math.factorial(20))",
        "",
        "6 126410606437752 2432902008176640000",
    ),
    (
        "from collections import Counter, deque\nprint(Counter('abca').most_common(1), deque([1, 2]))",
        "",
        "[('a', 2)] deque([1, 2])",
    ),
    ("import heapq, bisect\nh = [3, 1, 2]\nheapq.heapify(h)\nprint(h[0], bisect.bisect([1, 2, 3], 2))", "", "1 2"),
    (
        "from decimal import Decimal\nfrom fractions import Fraction\nprint(Decimal('0.1') * 3, Fraction(1, 3))",
        "",
        "0.3 1/3",
    ),
    ("import re, string\nprint(re.sub('[aeiou]', '', 'education'), string.digits)", "", "dctn 0123456789"),
    ("import json, hashlib\nprint(json.dumps({'a': [1]}), hashlib.md5(b'x').hexdigest()[:4])", "", '{"a": [1]} 9dd4'),
    ("from itertools import permutations\nprint(len(list(permutations(range(8)))))", "", "40320"),
    (
        "from functools import lru_cache\n@lru_cache(None)\ndef f(n): return n if n < 2 else f(n - 1) + f(n - 2)\n"
        "print(f(300))",
        "",
        "222232244629420445529739893461909967206666939096499764990979600",
    ),
    (
        "from datetime import date\nimport statistics\nprint(date(2024, 2, 29).weekday(), statistics.mean([1, 2, 3]))",
        "",
        "3 2",
    ),
    (
        "class A:\n    def __init__(self): self.x = 1\nif __name__ == '__main__':\n    print(A().x, __name__)",
        "",
        "1 __main__",
    ),
    ("import sys\nsys.stdout.write('no newline')\nsys.exit()", "", "no newline"),
    ("import atexit\natexit.register(lambda: print('end'))\nprint('start')", "", "start\nend"),
    (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(4) as p: print(list(p.map(len, ['a', 'bb'])))",
        "",
        "[1, 2]",
    ),
    (
        "import tempfile\nwith tempfile.TemporaryFile() as f:\n    f.write(b'ab'); f.seek(0); print(f.read())",
        "",
        "b'ab'",
    ),
    (
        "import random\nrandom.seed(1)\nprint(random.randint(1, 10), len({random.random() for _ in range(100)}))",
        "",
        "3 100",
    ),
    ("import asyncio\nasync def f(): return 7\nprint('coroutine', f.__name__)", "", "coroutine f"),
    ("import time, signal\nsignal.alarm(0)\nt = time.time()\ntime.sleep(0.01)\nprint(time.time() > t)", "", "True"),
    ("import resource, sys\nresource.setrlimit(resource.RLIMIT_STACK, (1 << 25, -1))\nprint('ok')", "", "ok"),
    ("import dataclasses, typing, enum\n@dataclasses.dataclass\nclass P:\n    x: int\nprint(P(1))", "", "P(x=1)"),
    ("def f(x: List[int]) -> Optional[int]: return x[0]\nprint(f([5]))", "", "5"),
    ("print('\\u00e4\\u4e2d', len(input()))", "\u00e4\u00f6", "\u00e4\u4e2d 2"),
    ("import sqlite3, zlib, csv, unicodedata, uuid\nprint(len(zlib.compress(b'a' * 1000)) < 50)", "", "True"),
    ("n = int(input())\nprint(n)\nexit()\nprint(2)", "5", "5"),
    ("def main():\n    print(1)\n    quit(0)\nmain()", "", "1"),
    ("open(1, 'w').write('written at the end')", "", "written at the end"),
    ("out = open(1, 'w')\nout.write('written late')", "", "written late"),
    ("import sys\nsys.__stdout__.write(sys.__stdin__.read())", "abc", "abc"),
    ("import sys, io\nout = sys.stdout\nsys.stdout = io.StringIO()\nprint('lost')\nout.write('kept')", "", "kept"),
    ("import sys, io\nout = io.TextIOWrapper(sys.stdout.buffer)\nout.write('wrapped')", "", "wrapped"),
    ("import io\nout = io.BufferedWriter(io.FileIO(1, 'w'))\nout.me = [out]\nout.write(b'cyclic')", "", "cyclic"),
    ("class A:\n    def __del__(self): print('del')\na = A()\nprint('end')", "", "end\ndel"),
    ("def f(x: int): pass\nprint(f.__annotations__['x'] is int, __builtins__.len([1]))", "", "True 1"),
    ("print(pow(3, 4, 5), int('9' * 5000) % 7, compile('1', 'x', 'eval').co_name)", "", "1 1 <module>"),
    (
        "import asyncio\nasync def f():\n    await asyncio.sleep(0.01)\n"
        "    return await asyncio.to_thread(len, 'ab')\nprint(asyncio.run(f()))",
        "",
        "2",
    ),
    ("print(*range(20000))", "", " ".join(map(str, range(20000)))),
]
