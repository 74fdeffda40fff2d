"""The chat template most families publish, for tokenizers that come without one. What differs is what a video becomes."""

_CHATML = """\
{%- for message in messages -%}SYSTEM
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'video' -%}
{{ 'VIDEO' }}
{%- elif part['type'] == 'text' -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

_DEFAULT_SYSTEM = """
{%- if loop.first and message['role'] != 'system' -%}
{{ '<|im_start|>system\\nTEXT<|im_end|>\\n' }}
{%- endif -%}"""


def chatml_template(video: str, *, default_system: str = "") -> str:
    """video: what stands for a video, as Jinja writes it between single quotes. default_system: the system prompt of a
    conversation that brings none; "": none is written."""
    system = _DEFAULT_SYSTEM.replace("TEXT", default_system) if default_system else ""
    return _CHATML.replace("SYSTEM", system).replace("VIDEO", video)
