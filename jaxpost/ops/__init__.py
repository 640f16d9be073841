"""Floor 0: functions of arrays only; they know no model, batch or algorithm."""
