"""`philens explore`: a local page that reads texts as they are pasted, written or chosen.

`models` is what reads, `session` what one tab of a browser is doing, `view` the markup, `app` the page's
controls (Gradio), `server` how it is served.
"""
