"""How things are measured: clocks, memory, the gate, the journal."""
