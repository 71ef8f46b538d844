"""What a person reads at the end of a run: the table in the terminal, and report.html.

The report is one file without scripts or anything from outside, made from ``run.json``,
``summary.json``, ``metrics.jsonl``, ``samples.json`` and ``analysis.json``; what is missing is left
out.
"""

from uml_fast.report.analyses import print_analyses
from uml_fast.report.page import write_report
from uml_fast.report.sections import ReportError
from uml_fast.report.table import print_table

__all__ = ["ReportError", "print_analyses", "print_table", "write_report"]
