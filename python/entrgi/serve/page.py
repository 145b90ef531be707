def build(about):
    return "<!doctype html><title>x</title>"


def headers():
    return {}


def report_template():
    return ""
