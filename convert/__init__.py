"""Published files to a checkpoint folder, once."""

from convert.files import ConvertError
from convert.report import Report, inspect
from convert.writer import convert

__all__ = ["ConvertError", "Report", "convert", "inspect"]
