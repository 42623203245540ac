"""The child process around Needle, an encoder-decoder that writes tool calls: one per resident model.

It imports onnxruntime, sentencepiece, numpy and the standard library, and of CALM only this package's own
modules: a start costs what the load costs. Those modules therefore import each other relatively, since in the
child this package stands alone, see __main__.

The protocol is that of needle/model/run.py (cactus-compute/needle, MIT):

    encoder   question tokens, <tools>, tokens of the tools' JSON, at most 1024
    decoder   </s>, then <tool_call> [{"name":"...","arguments":{...}}, ...] </s>, greedy, at most 256

What happens where, in the order of a request:

    plan, process, load     what the parent says; from there to a served model
    server, service         HTTP on a unix socket; turns and the line before them
    request, tools          what is asked, checked
    writer                  the loop that writes, with
      tokens, network         text to tokens, tokens to logits
      grammar                 which texts are calls of the given tools
      prompt_lookup           several tokens a run
    answer                  what was written, in OpenAI's shapes
    refusal                 why a request gets none
"""
