"""Compiler launcher for device code: fails on what ptxas only mentions.

Usage: check_device_code.py COMMAND... (nvcc, perhaps behind ccache, with -Xptxas=-v)

Runs the command. Its report of registers goes to <object>.resources; everything else it says is
shown. The build fails when a kernel spills more registers than ALLOWED says, or when ptxas serialises asynchronous
tensor-core products (C7508 and its neighbours), which costs most of their speed without an error.
"""

import re
import subprocess
import sys

SERIALISED = re.compile(r"C75(08|10|14|15|17|18)")
# Bytes of spills (stores and loads together) that a kernel may have; the first match counts, and a
# kernel without one may not spill. What is listed spills outside its innermost loop.
ALLOWED = [
    (re.compile(r"RunAgain|Careful|Redo"), 1 << 20),  # second runs over inputs with NaN
    (re.compile(r"SweepForwardKernel"), 1200),  # listed scores, in the search for the threshold
    (re.compile(r"ShortForwardKernelIf"), 4000),  # float32
    (re.compile(r"ShortForwardKernel.*Lb0E"), 2000),  # the same with general alpha and modifiers
    (re.compile(r"ShortForwardKernel"), 800),  # addresses, once a strip of 16 queries
    (re.compile(r"GeneralBackward.*AlphaE2.*ExtrasE2"), 1200),  # general alpha, optional results
    (re.compile(r"GeneralBackward.*ExtrasE2"), 600),  # optional results: their sums
    (re.compile(r"GeneralBackward.*ExtrasE1"), 400),  # sums of query_scale's gradient
    (re.compile(r"(GeneralBackward|TiledForward).*(If|Li256E)"), 128),  # float, 256 columns
    (re.compile(r"TiledForward.*Lb0EE"), 64),  # modifiers of the score: addresses, once a pass
    (re.compile(r"GeneralBackward"), 64),  # addresses, once a tile
    (re.compile(r"FinishForwardKernel.*AlphaModeE2E"), 32),  # general alpha: once a row
]
ENTRY = re.compile(r"(?:Compiling entry function|Function properties for) '?([\w$]+)'?")
SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def allowed_bytes(name):
    return next((limit for pattern, limit in ALLOWED if pattern.search(name)), 0)


def main():
    command = sys.argv[1:]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    target = command[command.index("-o") + 1] if "-o" in command else None
    report, shown, failures, function = [], [], [], ""
    for line in result.stderr.splitlines():
        name = ENTRY.search(line)
        function = name.group(1) if name else function
        spill = SPILL.search(line)
        if spill and int(spill.group(1)) + int(spill.group(2)) > allowed_bytes(function):
            failures.append(f"{function} spills registers: {line.strip()}")
        if SERIALISED.search(line):
            failures.append(line.strip())
        is_report = line.startswith("ptxas info") or line.startswith("    ") and "bytes" in line
        (report if is_report else shown).append(line)
    if target and report:
        with open(target + ".resources", "w", encoding="utf-8") as file:
            file.write("\n".join(report) + "\n")
    for line in shown + failures:
        print(line, file=sys.stderr)
    return result.returncode or (1 if failures else 0)


if __name__ == "__main__":
    sys.exit(main())
