"""Criteria and redundancy measures, held against one another and against chance."""
