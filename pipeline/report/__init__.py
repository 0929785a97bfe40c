"""The report on a dataset: its numbers as JSON, and one page that shows them beside its pictures.

Reads OUT and, for the contact sheet, the source. Writes two files of _vl01 and nothing else.
"""

from pipeline.report.write import Written, write_report

__all__ = ["Written", "write_report"]
