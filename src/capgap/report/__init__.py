"""The report of a sweep: figures, tables and one page that opens offline."""

from capgap.report.page import write_law_report, write_report

__all__ = ["write_law_report", "write_report"]
