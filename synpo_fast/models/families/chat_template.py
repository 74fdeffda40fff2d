"""The ChatML template that most families publish, for tokenizers without one. Families differ in what stands for a video."""

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
    """Builds the template as Jinja source.

    video: the text for a video, escaped for a Jinja string in single quotes. default_system: the system prompt for a
    conversation without one; "": no system prompt is added.
    """
    system = _DEFAULT_SYSTEM.replace("TEXT", default_system) if default_system else ""
    return _CHATML.replace("SYSTEM", system).replace("VIDEO", video)
