{{/* Fails at the first value of .Values.policies that files/policy.schema.json does not allow, and names its line.
     The schema is what `fgpu policy schema` prints. Only the agent checks rules between two values. */}}
{{- define "fgpu.checkPolicies" -}}
{{- $root := .Files.Get "files/policy.schema.json" | fromJson }}
{{- range $file, $text := .Values.policies }}
{{- $before := 0 }}
{{- range $document := regexSplit "(?m)^---.*$" $text -1 }}
{{- $value := fromYaml $document }}
{{- with $value.Error }}
{{- $line := regexFind "line [0-9]+" . | trimPrefix "line " | default "1" | int | add $before }}
{{- fail (printf "policies: %s:%d: is not YAML: %s" $file $line (regexReplaceAll "^.*(yaml|json): (line [0-9]+: )?" . "")) }}
{{- end }}
{{- with and $value (include "fgpu.invalid" (dict "root" $root "schema" $root "value" $value "path" list)) }}
{{- $found := fromJson . }}
{{- $line := include "fgpu.lineOf" (dict "text" $document "path" $found.path) | int | add $before }}
{{- fail (printf "policies: %s:%d: %s%s" $file $line ($found.path | join "." | printf "%s: " | trimPrefix ": ") $found.text) }}
{{- end }}
{{- $before = splitList "\n" $document | len | add -1 | add $before }}
{{- end }}
{{- end }}
{{- end }}

{{/* The first value below .path that .schema does not allow, as JSON {path, text}; nothing if there is none. */}}
{{- define "fgpu.invalid" -}}
{{- $all := . }}
{{- $schema := .schema }}
{{- with index .schema "$ref" }}{{ $schema = index $all.root "$defs" (base .) }}{{ end }}
{{- $text := "" }}
{{- $inner := "" }}
{{- $kind := get (dict "string" "string" "float64" "integer" "map" "object" "slice" "array") (kindOf .value) }}
{{- if $schema.anyOf }}
{{- $fits := false }}
{{- range $schema.anyOf }}
{{- if not (include "fgpu.invalid" (dict "root" $all.root "schema" . "value" $all.value "path" $all.path)) }}{{ $fits = true }}{{ end }}
{{- end }}
{{- if not $fits }}{{ $text = "is not valid" }}{{ end }}
{{- else if and $schema.type (ne $schema.type $kind) }}{{ $text = printf "is no %s" $schema.type }}
{{- else if and $schema.const (ne $schema.const .value) }}{{ $text = printf "must be %s" $schema.const }}
{{- else if and $schema.enum (not (has .value $schema.enum)) }}{{ $text = printf "is none of %s" (join ", " $schema.enum) }}
{{- else if and $schema.pattern (not (regexMatch $schema.pattern .value)) }}{{ $text = "is not valid" }}
{{- else if eq $kind "integer" }}
{{- if or (ne (floor .value) .value) (lt .value (float64 $schema.minimum)) (gt .value (float64 $schema.maximum)) }}
{{- $text = printf "is not a whole number from %v to %v" $schema.minimum $schema.maximum }}
{{- end }}
{{- else if and (has $kind (list "array" "object")) (or (lt (len .value) (int (or $schema.minItems $schema.minProperties 0))) (gt (len .value) (int (or $schema.maxItems $schema.maxProperties 64)))) }}
{{- $text = "is empty or too long" }}
{{- else if eq $kind "array" }}
{{- range $value := .value }}
{{- if not $inner }}{{ $inner = include "fgpu.invalid" (dict "root" $all.root "schema" $schema.items "value" $value "path" $all.path) }}{{ end }}
{{- end }}
{{- else if eq $kind "object" }}
{{- range $key := $schema.required }}
{{- if not (or $text (hasKey $all.value $key)) }}{{ $text = printf "needs %s" $key }}{{ end }}
{{- end }}
{{- range $key, $value := .value }}
{{- $next := index (default dict $schema.properties) $key | default $schema.additionalProperties }}
{{- $path := append $all.path $key }}
{{- if not (or $text $inner) }}
{{- if $next }}{{ $inner = include "fgpu.invalid" (dict "root" $all.root "schema" $next "value" $value "path" $path) }}
{{- else }}{{ $inner = dict "path" $path "text" (printf "is unknown; known: %s" (keys $schema.properties | sortAlpha | join ", ")) | toJson }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- if $text }}
{{- if not (has $kind (list "array" "object")) }}{{ $text = printf "%s %s" (toJson .value) $text }}{{ end }}
{{- range $n, $example := .schema.examples }}{{ $text = printf "%s%s %s" $text (ternary " or" ": write it as" (gt $n 0)) (ternary $example (toJson $example) (kindIs "string" $example)) }}{{ end }}
{{- dict "path" .path "text" $text | toJson }}
{{- else }}{{ $inner }}
{{- end }}
{{- end }}

{{/* The number of the line of .text with the last key of .path: the keys follow each other. */}}
{{- define "fgpu.lineOf" -}}
{{- $lines := splitList "\n" .text }}
{{- $at := regexFind "^(\\s*\n|\\s*#.*\n)*" .text | splitList "\n" | len | add -1 }}
{{- range $key := .path }}
{{- $found := -1 }}
{{- range $number, $line := $lines }}
{{- if and (lt $found 0) (ge $number $at) (regexMatch (printf "(^|[\\s{,\"'-])%s[\"']?\\s*:" (regexQuoteMeta $key)) $line) }}{{ $found = $number }}{{ end }}
{{- end }}
{{- $at = max $at $found }}
{{- end }}
{{- add $at 1 }}
{{- end }}
