{{/* What the containers of the test have in common. */}}
{{- define "steersman.test.container" -}}
{{ include "steersman.containerImage" (dict "root" . "image" .Values.images.core) }}
env:
  - name: HOME
    value: /tmp
resources:
  requests: {cpu: 50m, memory: 64Mi}
  limits: {memory: 256Mi}
{{- end -}}

{{/* A program that waits for an address to answer with 200, and prints what it says. */}}
{{- define "steersman.test.fetch" -}}
import sys, time, urllib.error, urllib.request
url, end = sys.argv[1], time.monotonic() + 300
while True:
    try:
        with urllib.request.urlopen(url, timeout=70) as answer:
            sys.exit(print(f"{url}: {answer.read().decode()}"))
    except OSError as error:
        said = error.read().decode() if isinstance(error, urllib.error.HTTPError) else error
        if time.monotonic() > end:
            sys.exit(f"{url}: {said}")
        time.sleep(1)
{{- end -}}
