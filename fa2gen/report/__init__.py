"""What became of a kernel's source: machine instructions and live registers of each line, and a page that shows them
beside shared memory, resources, the selector's reason and what was measured. Needs no GPU."""

from __future__ import annotations

from fa2gen.report.lines import Line, Listing, listing_of
from fa2gen.report.page import page, results_here
from fa2gen.report.sass import disassembler

__all__ = ["Line", "Listing", "disassembler", "listing_of", "page", "results_here"]
