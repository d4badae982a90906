"""Hooks of the user's own, which go on working for tests that measure seconds."""


def pytest_benchmark_scale_unit(unit):
    return ("u", 1e6) if unit == "seconds" else ("", 1.0)


def pytest_benchmark_update_json(output_json):
    output_json["mine"] = True
